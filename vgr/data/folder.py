"""A folder of videos as a source of clips: cut at shots' bounds and judged, with captions and cameras.

Beside walk.mp4 may stand walk.txt (its caption), walk.json ({"caption"} or [{"start_s", "end_s", "caption"}, ...]) and
its cameras in any form of `vgr.geometry.formats`: walk.npz, a text or json file of poses, COLMAP's folder walk/.
Or captions.csv at the top of the folder has columns file, caption and, for parts of a video, start_s, end_s.
How many clips there are is known after `scan`, which reads every video once and keeps what it found.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vgr.data.annotators import DepthModel
from vgr.data.files import Journal, atomic
from vgr.data.filters import LIMITS, PRESETS, Limit, Meter, Verdict, camera_figures, judge, runs
from vgr.data.prepare import in_order
from vgr.data.sidecars import camera_file, captions_of, captions_table, poses_at, sidecars, told
from vgr.data.video import CONTAINERS, Clip, Damage, Shown, at_rate, fitted, iter_frames, joined, probe
from vgr.geometry.cameras import crop_intrinsics, from_fov
from vgr.geometry.checks import check_cameras
from vgr.geometry.conventions import check_convention
from vgr.geometry.formats import read_cameras
from vgr.geometry.reconstruct import estimate_cameras
from vgr.seeding import held_out
from vgr.types import Cameras

Array = NDArray[np.float64]
# Several frames (N,H,W,3) of each of some shots to a caption of each.
CaptionsOf = Callable[[Sequence[NDArray[np.uint8]]], list[str]]
# Frames (F,H,W,3) of a shot, frames a second and intrinsics (4,), if known, to c2w (F,4,4), intrinsics (F,4) and
# confidence; ValueError: why there are none.
CamerasOf = Callable[[NDArray[np.uint8], float, Array | None], tuple[Array, Array, float]]

_THUMB, _STRETCH_S, _SHARP_S = 144, 0.5, 0.5  # thumbnails' short side; longest dull stretch kept; between two looks
_HFOV_DEG, _LOOKS, _AT_ONCE = 60.0, 6, 4  # told to models without cameras; frames of a shot for a captioner; shots


class FolderSource:
    """Clips of `frames` frames at fps, of size_hw pixels, of all videos in a folder and its folders.

    licence: of the videos, for the manifest. cameras: "files", of sidecar files, held against the pictures; "estimate",
    by cameras_of; None: none, which suits models without cameras only (the clips say so). scale: metres of one unit of
    the poses; None: unknown. depth: folder of a `DepthModel` that brings estimates to metres. hfov_deg: horizontal
    field of view, where pose files have no intrinsics or in place of an estimate. captioner: a folder, for `describe`.
    cuts: most cuts within a clip; 0 ends clips at shot boundaries. val_share: of the files, chosen by name, held out
    whole. limits: one of `filters.PRESETS`, or rules of `filters.LIMITS` set otherwise, [low, high] or null. part:
    "i/n", the i-th of n jobs at one set, which scans every n-th file. Raises ValueError for settings; what is wrong
    with one video leaves that video out.
    """

    def __init__(self, folder: str, frames: int, size_hw: tuple[int, int], fps: float, licence: str = "not stated",
                 cameras: str | None = None, scale: float | None = None, depth: str | None = None,
                 hfov_deg: float | None = None, captioner: str | None = None, cuts: int = 0, val_share: float = 0.05,
                 limits: str | Mapping[str, Limit | None] | None = None, part: str | None = None,
                 clips_per_visit: int = 1, cameras_of: CamerasOf = estimate_cameras) -> None:
        self.folder, self.frames, self.size_hw = str(folder), frames, (int(size_hw[0]), int(size_hw[1]))
        self.fps, self.licence, self.cameras, self.scale = float(fps), licence, cameras, scale
        self.depth, self.hfov_deg, self.captioner = depth, hfov_deg, captioner
        self.cuts, self.val_share = cuts, val_share
        if part and not ((p := re.fullmatch(r"(\d+)/(\d+)", part)) and int(p[1]) < int(p[2])):
            raise ValueError(f"source.part={part}: must be i/n with i from 0 to n - 1, or null")
        self._part = (int(p[1]), int(p[2])) if part else (0, 1)
        rules = PRESETS.get(limits, {limits: None}) if isinstance(limits, str) else limits or {}
        self.limits, self.clips_per_visit = {**LIMITS, **{k: v and tuple(v) for k, v in rules.items()}}, clips_per_visit
        if unknown := set(rules) - set(LIMITS):
            raise ValueError(f"source.limits={min(unknown)}: rules: {', '.join(LIMITS)}; presets: {', '.join(PRESETS)}")
        self._cameras_of = cameras_of if depth is None else partial(cameras_of, depth_of=DepthModel(depth))
        if not Path(folder).is_dir():
            raise ValueError(f"source.folder={folder}: no such folder; give one that holds videos")
        if frames < 1 or min(self.size_hw) < 8 or not self.fps > 0 or cuts < 0 or not 0 < val_share < 1:
            raise ValueError(f"source.frames={frames}, source.size_hw={list(size_hw)}, source.fps={fps}, "
                             f"source.cuts={cuts}, source.val_share={val_share}: at least 1, 8 pixels, above 0, 0, and "
                             "a share between 0 and 1")
        if cameras not in (None, "files", "estimate") or depth and (cameras != "estimate" or scale is not None):
            raise ValueError(f"source.cameras={cameras}: must be files, estimate or null; with source.depth, estimate "
                             "and source.scale=null")
        if cameras == "estimate" and cameras_of is estimate_cameras and importlib.util.find_spec("pycolmap") is None:
            raise ValueError("source.cameras=estimate wants pycolmap: pip install 'vgr[video]'")
        self.splits: dict[str, Any] = {"train": [], "val": []}
        self._plan: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        self._dropped: dict[str, list[dict[str, Any]]] = {}
        self._cache = Path()

    def _settings(self) -> dict[str, Any]:
        """What decides what a scan finds in one file."""
        left_out = ("splits", "folder", "val_share", "licence", "captioner", "clips_per_visit")
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in left_out}

    def files(self) -> list[str]:
        """Names of the videos that this job scans."""
        return list(self._files())[self._part[0] :: self._part[1]]

    def _journal(self) -> Journal:
        return Journal(self._cache, "scan-{}-of-{}.jsonl".format(*self._part))

    def scan(self, cache: str | Path, workers: int = 1, progress: Callable[[int], None] = lambda more: None) -> int:
        """Finds the clips of both splits; returns how many files were new to `cache`, a folder.

        progress hears of files, at first of those scanned before. Raises ValueError where nothing is left of a split.
        """
        self._cache = Path(cache)
        files, journal = self._files(), self._journal()
        self._ids = {rel: self._id(rel, captions) for rel, captions in files.items()}
        todo = [rel for rel in self.files() if self._ids[rel] not in journal.known]
        progress(len(self.files()) - len(todo))
        for rel, found in zip(todo, in_order(self._scan, [(rel, files[rel]) for rel in todo], workers)):
            journal.add({"id": self._ids[rel], **found})
            progress(1)
        known = self._journal().known  # with what others have found meanwhile
        self._share_out({rel: known[self._ids[rel]] for rel in files if self._ids[rel] in known})
        self._missing = len(files) - len(self._records)
        return len(todo)

    def missing(self) -> int:
        """Files, or groups of shots, that other jobs have yet to scan or describe before any knows all clips."""
        return self._missing

    def uncaptioned(self) -> list[tuple[str, list[tuple[dict[str, Any], dict[str, Any]]]]]:
        """Clips and shots that no file captions, few at a time, by the file that holds them."""
        mute = [(rel, [(c, x) for c in r["clips"] for x in c["shots"] if not x["caption"]])
                for rel, r in self._records.items()]
        return [(rel, own[at : at + _AT_ONCE]) for rel, own in mute for at in range(0, len(own), _AT_ONCE)]

    def describe(self, captions_of: CaptionsOf, name: str, fingerprint: str,
                 progress: Callable[[int], None] = lambda more: None) -> None:
        """Captions, by a model called name, of shots that no file captions; kept in the cache for its fingerprint."""
        journal, own = self._journal(), set(self.files())
        for rel, group in self.uncaptioned():
            place = [self._ids[rel], fingerprint, group[0][0]["k"], group[0][1]["start"]]
            told = hashlib.sha256(json.dumps(place).encode()).hexdigest()
            if told not in journal.known and rel in own:
                looks = [self._pictures(Path(self.folder) / rel, clip, np.linspace(x["start"], x["end"] - 1, _LOOKS))
                         for clip, x in group]
                journal.add({"id": told, "captions": captions_of(looks)})
            elif told not in journal.known:
                self._missing += 1
                continue
            for (_, shot), caption in zip(group, journal.known[told]["captions"], strict=True):
                shot |= {"caption": caption, "captioned_by": name}
            progress(len(group))
        self._share_out(self._records)

    def _files(self) -> dict[str, list[dict[str, Any]]]:
        """Videos by name, relative to the folder, in order, with what captions.csv says of each."""
        root = Path(self.folder)
        found = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in CONTAINERS)
        files: dict[str, list[dict[str, Any]]] = {rel: [] for rel in found if (root / rel).is_file()}
        if not files:
            raise ValueError(f"source.folder={self.folder} holds no videos; their names end in {', '.join(CONTAINERS)}")
        for row in captions_table(root / "captions.csv"):
            if row["file"] in files:
                files[row["file"]].append(row)
        return files

    def _share_out(self, records: dict[str, dict[str, Any]]) -> None:
        self._records = records
        good = [rel for rel in records if records[rel]["clips"]]
        held = held_out(good, self.val_share)
        for split in self.splits:
            own = [rel for rel in records if (rel in held) == (split == "val")]
            self._plan[split] = [(rel, clip) for rel in own for clip in records[rel]["clips"]]
            self._dropped[split] = [{"file": rel, **x} for rel in own for x in records[rel]["dropped"]]
            text = json.dumps([[rel, records[rel]["clips"]] for rel in own])
            self.splits[split] = [f"{len(own)} files, plan {hashlib.sha256(text.encode()).hexdigest()[:16]}"]
        if not self._plan["train"] and self._part == (0, 1):
            told = [f"{rule} {len(x)}" for rule, x in self.left_out("train").items()]
            raise ValueError(f"source.folder={self.folder}: nothing to train on in {len(records)} files, {len(good)} "
                             f"with clips, of which one at least is held out; left out: {', '.join(told)}")

    def count(self, split: str) -> int:
        """Clips of a split, once scanned."""
        return len(self._plan[split])

    def left_out(self, split: str) -> dict[str, list[dict[str, Any]]]:
        """What a split lost, by rule: file, start_s, end_s, rule, value, limit. Of files without clips: train's."""
        kinds: dict[str, list[dict[str, Any]]] = {}
        for entry in self._dropped[split]:
            kinds.setdefault(entry["rule"], []).append(entry)
        return kinds

    def capture(self, seed: int, split: str, visit: int) -> list[Clip]:
        """The clips_per_visit clips of one visit, fewer at the end; a function of the scanned files."""
        first = visit * self.clips_per_visit
        return [self._clip(rel, plan) for rel, plan in self._plan[split][first : first + self.clips_per_visit]]

    def _clip(self, rel: str, plan: dict[str, Any]) -> Clip:
        path = Path(self.folder) / rel
        shown = self._read(path, plan)
        c2w, k = self._cameras(path, plan, [x.index for x in shown], [x.time_s for x in shown], shown[0].size_hw)
        return Clip(
            frames=np.stack([x.rgb(self.size_hw) for x in shown]), c2w=c2w, intrinsics=k, fps=self.fps,
            shots=plan["shots"], metric_scale=self.cameras is not None and (self.scale or self.depth) is not None,
            source={"name": "folder", "file": rel, "start_s": plan["start_s"], "cameras": self.cameras,
                    "figures": plan["figures"]},
        )

    def _read(self, path: Path, plan: Mapping[str, Any]) -> list[Shown]:
        damage: Damage = []
        frames = iter_frames(path, damage, plan["start_s"] - 1e-4, plan["index"])
        shown = [x for _, x in itertools.islice(at_rate(frames, self.fps, plan["origin_s"], plan["k"]), self.frames)]
        if len(shown) < self.frames or abs(shown[0].time_s - plan["start_s"]) > 1e-3:
            raise ValueError(f"{path}: {len(shown)} frames of {self.frames} at {plan['start_s']:.3f} s; has it changed "
                             f"since it was scanned? Remove {self._cache}")
        return shown

    def _id(self, rel: str, captions: list[dict[str, Any]]) -> str:
        """Of a video, its sidecars and the settings: what was found in it holds as long as this does."""
        path = Path(self.folder) / rel
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in [path, *sidecars(path)]]
        text = json.dumps([rel, stats, captions, self._settings()], default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _scan(self, task: tuple[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """What one video holds: clips and what was left out, with figures of JSON only."""
        rel, table = task
        path, limits = Path(self.folder) / rel, self.limits
        clips: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []

        def drop(start_s: float, end_s: float, rule: str, value: Any, limit: Any = None) -> None:
            span = {"start_s": round(start_s, 3), "end_s": round(end_s, 3)}
            if isinstance(value, float):
                value = float(f"{value:.5g}") if math.isfinite(value) else None
            dropped.append({**span, "rule": rule, "value": value, "limit": limit and list(limit)})

        record = {"file": rel, "clips": clips, "dropped": dropped}
        try:
            info, captions = probe(path), captions_of(path, table)
        except (ValueError, OSError) as error:
            drop(0, 0, "unreadable", str(error))
            return record
        record |= {"seconds": info.seconds, "fps": info.fps, "size_hw": info.size_hw, "notes": info.notes}
        wanted = {"upscaling": max(w / h for w, h in zip(self.size_hw, info.size_hw)) - 1e-6}
        if info.fps:
            wanted["frame_rate"] = info.fps / self.fps
        if verdict := judge(wanted, limits):
            drop(0, info.seconds, *verdict)
            return record
        try:
            meter, shown, damage, frames = self._measure(path)
        except (ValueError, OSError) as error:
            drop(0, info.seconds, "unreadable", str(error))
            return record
        times = np.array([t for t, _ in shown])
        for at, end, what in joined(damage):
            drop(at, end, "damaged", what)
        trusted = self.cameras != "files"  # until the pictures of one clip have told that the poses are theirs
        for a, b in self._segments(meter, times, [at for at, _ in damage], drop):
            for start in range(a, b - self.frames + 1, self.frames):
                plan = self._plan_clip(start, shown, times, meter, captions) | {"video_frames": frames}
                verdict = self._judge(path, plan, meter, shown, info.size_hw, check=not trusted)
                trusted = trusted or plan.get("convention") == "agrees"
                if verdict is None:
                    clips.append(plan)
                else:
                    drop(times[start], times[start] + self.frames / self.fps, *verdict)
            if rest := (b - a) % self.frames:
                limit = [self.frames / self.fps, None]
                drop(times[b - rest], times[b - 1] + 1 / self.fps, "short", rest / self.fps, limit)
        return record

    def _measure(self, path: Path) -> tuple[Meter, list[tuple[float, int]], Damage, int]:
        """One pass: figures of the frames at fps, their times and indices, the damage met, and how many frames the
        file has. ValueError where there are none."""
        meter, damage, shown, last = Meter(), Damage(), list[tuple[float, int]](), -1

        def decoded() -> Iterator[Shown]:
            nonlocal last
            for x in iter_frames(path, damage):
                last = x.index
                yield x

        scale = min(1.0, _THUMB / min(self.size_hw))
        thumb = (max(8, round(self.size_hw[0] * scale)), max(8, round(self.size_hw[1] * scale)))
        every = max(1, round(_SHARP_S * self.fps))
        for k, x in at_rate(decoded(), self.fps):
            meter.add(x.rgb(thumb), x.rgb(self.size_hw) if k % every == 0 else None)
            shown.append((x.time_s, x.index))
        meter.done()
        if not shown:
            raise ValueError(damage[0][1] if damage else "holds no frames")
        return meter, shown, damage, last + 1

    def _segments(
        self, meter: Meter, times: Array, damage: list[float], drop: Callable[..., None]
    ) -> list[tuple[int, int]]:
        """First frames and ends of what lies between cuts, damage, gaps and dull stretches, which are dropped."""
        # A picture shown more than a frame and a half from its time fills a gap.
        bad = np.abs(times - times[0] - np.arange(len(times)) / self.fps) * self.fps > 1.5
        for a, b in runs(bad):
            drop(times[0] + a / self.fps, times[0] + b / self.fps, "gap", (b - a) / self.fps)
        for a, b, rule in meter.stretches(round(_STRETCH_S * self.fps)):
            drop(times[a], times[b - 1] + 1 / self.fps, rule, (b - a) / self.fps, [None, _STRETCH_S])
            bad[a:b] = True
        breaks = {int(np.searchsorted(times, at, side="right")) for at in damage}
        breaks |= set(meter.cuts) if self.cuts == 0 else set()
        edges = [0, *sorted(b for b in breaks if 0 < b < len(times)), len(times)]
        return [(a + s, a + e) for a, b in itertools.pairwise(edges) for s, e in runs(~bad[a:b])]

    def _plan_clip(self, start: int, shown: Sequence[tuple[float, int]], times: Array, meter: Meter,
                   captions: list[dict[str, Any]]) -> dict[str, Any]:
        inside = [c - start for c in meter.cuts if start < c < start + self.frames]
        bounds = [0, *inside, self.frames]
        begins = times[start] - times[0]
        shots = [
            {"start": a, "end": b, "caption": told(captions, begins + a / self.fps, begins + b / self.fps)}
            for a, b in itertools.pairwise(bounds)
        ]
        return {"k": start, "origin_s": times[0], "start_s": shown[start][0], "index": shown[start][1], "shots": shots}

    def _judge(self, path: Path, plan: dict[str, Any], meter: Meter, shown: Sequence[tuple[float, int]],
               shown_hw: tuple[int, int], check: bool) -> tuple[str, Any, Any] | Verdict | None:
        """Why a clip is left out: rule, figure, limit."""
        span = slice(plan["k"], plan["k"] + self.frames)
        if len(plan["shots"]) > self.cuts + 1:
            return "cuts", len(plan["shots"]) - 1, [None, self.cuts]
        figures = meter.figures(span.start, span.stop)
        if verdict := judge(figures, self.limits):
            return verdict
        plan["figures"] = {k: float(f"{v:.5g}") for k, v in figures.items() if math.isfinite(v)}
        try:
            if self.cameras == "estimate":
                self._estimate(path, plan)
            c2w, k = self._cameras(path, plan, [i for _, i in shown[span]], [t for t, _ in shown[span]], shown_hw)
            if self.cameras is not None:
                for shot in plan["shots"]:
                    own = slice(shot["start"], shot["end"])
                    if verdict := judge(camera_figures(c2w[own], k[own], self.size_hw), self.limits):
                        return verdict
                cameras = Cameras(torch.from_numpy(c2w)[None], torch.from_numpy(k)[None])
                check_cameras(cameras, self.fps, self.size_hw)
                if check:
                    end = plan["shots"][0]["end"]
                    report = check_convention(self._pictures(path, plan)[:end], cameras.frames(0, end))
                    plan["convention"] = report.verdict
        except (ValueError, OSError) as error:
            return "cameras", str(error), None
        return None

    def _estimate(self, path: Path, plan: dict[str, Any]) -> None:
        """Cameras by cameras_of, kept beside the journal under a name of the frames they are of."""
        rel = path.relative_to(self.folder).as_posix()
        name = hashlib.sha256(json.dumps([self._id(rel, []), plan["start_s"]]).encode()).hexdigest()[:24]
        plan["cameras"], file = name, self._cache / f"{name}.npz"
        if not file.is_file():
            frames, (height, width) = self._pictures(path, plan), self.size_hw
            known = None if self.hfov_deg is None else from_fov(self.hfov_deg, width / height, torch.float64).numpy()
            parts = [self._cameras_of(frames[x["start"] : x["end"]], self.fps, known) for x in plan["shots"]]
            c2w, k = (np.concatenate(x) for x in list(zip(*parts))[:2])
            with atomic(file) as out:
                np.savez(out, c2w=c2w, intrinsics=k, fps=self.fps, confidence=min(part[2] for part in parts))
        with np.load(file, allow_pickle=False) as stored:
            plan["figures"]["pose_confidence"] = float(stored["confidence"])

    def _pictures(self, path: Path, plan: Mapping[str, Any], at: Array | None = None) -> NDArray[np.uint8]:
        """A clip's frames (F,H,W,3), or those at, in the shape of size_hw, up to a short side of 480 as they came."""
        shown = self._read(path, plan)
        shown = shown if at is None else [shown[i] for i in np.unique(at.round().astype(int))]
        scale = max(1.0, min(480 / min(self.size_hw), *(a / b for a, b in zip(shown[0].size_hw, self.size_hw))))
        size = round(self.size_hw[0] * scale), round(self.size_hw[1] * scale)
        return np.stack([x.rgb(size) for x in shown])

    def _cameras(self, path: Path, plan: Mapping[str, Any], indices: Sequence[int], times: Sequence[float],
                 shown_hw: tuple[int, int]) -> tuple[Array, Array]:
        """c2w (F,4,4) in metres where scale is known, and k (F,4) of the cut pictures. ValueError: there are none."""
        if self.cameras == "estimate":
            own = read_cameras(self._cache / f"{plan['cameras']}.npz")
            c2w, k = own.c2w[0].clone(), own.intrinsics[0]
        elif self.cameras is None:
            c2w = torch.eye(4, dtype=torch.float64).repeat(len(times), 1, 1)
            k = from_fov(_HFOV_DEG, self.size_hw[1] / self.size_hw[0], torch.float64).repeat(len(times), 1)
        else:
            seconds = np.array(times) - plan["origin_s"]
            c2w, k = poses_at(camera_file(path, shown_hw), plan["video_frames"], np.array(indices), seconds)
            if bool(k.isnan().any()):
                if self.hfov_deg is None:
                    raise ValueError(f"the poses of {path.name} come without intrinsics; give source.hfov_deg")
                k = from_fov(self.hfov_deg, shown_hw[1] / shown_hw[0], torch.float64).repeat(len(times), 1)
            scaled, (top, left) = fitted(shown_hw, self.size_hw)
            k = crop_intrinsics(k, scaled, (top, left, *self.size_hw))
        c2w[:, :3, 3] *= self.scale or 1.0
        return c2w.numpy(), k.numpy()
