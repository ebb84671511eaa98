"""Measure the videos of a set: one table of numbers, trends and features per video, kept so that nothing is done twice.

What stands in `kept` was measured from the same bytes by the same code and settings, so many processes can share the
work (each its `part`), and the last one to come finds all of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import atomic
from vgr.data.filters import Meter
from vgr.data.video import fitted, iter_video
from vgr.metrics import drift as drift_
from vgr.metrics import features, image, shots
from vgr.metrics.extractors import Extractor, clip_of
from vgr.metrics.revisit import measure_revisit
from vgr.report import poses
from vgr.report.poses import Path
from vgr.report.sets import VideoSet, fingerprint
from vgr.report.table import FD
from vgr.seeding import derive_seed

Array = NDArray[np.float64]
Frames = NDArray[np.uint8]
Look = Callable[[], Iterable[Frames]]  # every call gives the video's frames from the first
_THUMB = 144  # shorter side of the pictures in which cuts are sought


class Measured(NamedTuple):
    """Of one video: metric -> value, its drift (None if too short), distance -> features (rows, D) and the key."""

    key: str
    values: dict[str, float]
    drift: drift_.Drift | None
    features: dict[str, Array]


class Job(NamedTuple):
    """What all videos of a run share: the protocol, frames measured (None: each video whole), extractors by metric, the
    folder of what is measured already, the part (i of n, from 0) and done(n)."""

    protocol: dict[str, Any]
    frames: int | None
    extractors: Mapping[str, Extractor]
    kept: File
    part: tuple[int, int]
    done: Callable[[int], None]


def measure_set(
    job: Job, row: str, videos: VideoSet, keys: Sequence[str], truth: VideoSet | None = None,
    paths: Mapping[str, Sequence[Path]] | None = None,
) -> list[Measured]:  # fmt: skip
    """Measure this part of a set's videos, in the order of keys; of the row "reference" features alone, true clips'.

    truth None leaves PSNR and SSIM out. paths gives a key's commanded (c2w, intrinsics), nothing leaves the pose
    out; errors against a second path are called other_<metric>. The first frame, given to the model, counts for
    the pose alone. Raises ValueError when sizes differ from the truth's.
    """
    settings = {"protocol": job.protocol["sha256"], "frames": job.frames, "code": _code(),
                "weights": {name: x.about for name, x in job.extractors.items()}}  # fmt: skip

    def one(index: int) -> Measured:
        key = keys[index]
        own, info = (paths or {}).get(key, ()), videos.info
        files = [s.folder / f"{key}.mp4" for s in (videos, truth) if s is not None]
        told = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
        told += [hashlib.sha256(a.tobytes()).hexdigest() for path in own for a in path]
        told += [info.get("fps"), info.get("chunk_starts"), info.get("cuts", {}).get(key)]
        mark, place = fingerprint({**settings, "inputs": told}), job.kept / row / f"{key}.npz"
        found = _read(place, key, mark)
        if found is None:
            found = _measure(job, row, videos, key, index, truth, own)
            _write(place, mark, found)
        job.done(1)
        return found

    with ThreadPoolExecutor(2) as pool:  # OpenCV and PyAV release the interpreter lock
        return list(pool.map(one, range(job.part[0], len(keys), job.part[1])))


def _measure(
    job: Job, row: str, videos: VideoSet, key: str, index: int, truth: VideoSet | None, paths: Sequence[Path]
) -> Measured:
    if job.frames is None:
        count, fps, cuts = _scan(iter_video(videos.folder / f"{key}.mp4"), "shots" in job.protocol)
        fps = float(videos.info.get("fps") or fps)

        def look() -> Iterable[Frames]:
            return (frame for frame, _ in iter_video(videos.folder / f"{key}.mp4"))

        values, trend = _trends(job, look, count, fps, cuts, videos.info, key)
        values |= _structure(job, look, count, fps, cuts, paths[0] if paths else None)[0]
        return Measured(key, values, trend, {})
    video, fps = videos.video(key, job.frames)
    if row == "reference":
        chance = np.random.default_rng(derive_seed(job.protocol["seed"], "clip", index))
        return Measured(key, {}, None, all_features(job, video, chance=chance))
    cuts = _scan(((f, i / fps) for i, f in enumerate(video)), True)[2] if "shots" in job.protocol else []
    values, trend = _trends(job, lambda: video, len(video), fps, cuts, videos.info, key)
    if truth is not None:
        values |= _agreement(videos, truth, key, video)
    for prefix, scores in zip(("", "other_"), poses.pose_values(video, paths) if paths else ()):
        values.update({prefix + k: v for k, v in scores.items()})
    more, estimate = _structure(job, lambda: video, len(video), fps, cuts, paths[0] if paths else None)
    values |= more
    if paths and "revisit" in job.protocol:
        found = measure_revisit(video, paths[0][0], fps, estimate, job.protocol["revisit"]["gap_s"])
        values |= {"revisit_db": found.psnr_db, "memory_db": found.memory_db, "memory_ssim": found.memory_ssim}
        pairs = found.pairs + found.dropped
        values["return_dropped"] = found.dropped / pairs if pairs and estimate is not None else np.nan
    table = all_features(job, video)
    if row == "truth":  # the control of distances' sense of time
        chance = np.random.default_rng(derive_seed(job.protocol["seed"], "shuffle", index))
        table |= {f"shuffled {name}": x for name, x in all_features(job, video, shuffle=chance).items()}
    return Measured(key, values, trend, table)


def _scan(frames: Iterable[tuple[Frames, float]], find_cuts: bool) -> tuple[int, float, list[int]]:
    """Frames, their rate and the cuts of a video that passes once."""
    import cv2

    meter, times = Meter(), []
    for frame, time_s in frames:
        times.append(time_s)
        if find_cuts:
            scale = min(1.0, _THUMB / min(frame.shape[:2]))
            size, _ = fitted(frame.shape[:2], tuple(max(8, round(scale * s)) for s in frame.shape[:2]))
            meter.add(cv2.resize(frame, size[::-1], interpolation=cv2.INTER_AREA))
    meter.done()
    return len(times), (len(times) - 1) / max(times[-1] - times[0], 1e-9), meter.cuts


def _trends(
    job: Job, look: Look, count: int, fps: float, cuts: list[int], info: dict[str, Any], key: str
) -> tuple[dict[str, float], drift_.Drift | None]:
    values: dict[str, float] = {}
    if "shots" in job.protocol:
        values["cuts"] = float(len(cuts))
        if (wanted := info.get("cuts", {}).get(key)) is not None:
            values["sca"] = shots.shot_cut_accuracy(cuts, [c for c in wanted if c < count], count)
    window, cuts = job.protocol["drift"]["window_s"], [c - 1 for c in cuts if c > 1]
    edges = np.array([0, *cuts, count - 1]) / fps
    if np.diff(edges).max() + 1e-6 < 3 * window:
        return values, None
    trend = drift_.measure_drift(islice(iter(look()), 1, None), fps, window, cuts)
    for name in drift_.UNITS:
        values |= {f"{name}_per_s": trend.slope[name], f"{name}_end_minus_start": trend.start_end[name]}
    values |= {"motion_level": trend.level["motion"], "stagnation": drift_.stagnation(trend.curve["motion"])}
    if starts := info.get("chunk_starts"):
        values["seam_ratio"] = drift_.seam_ratio(trend.steps, [s - 1 for s in starts if s > 1])
    return values, trend


def _agreement(videos: VideoSet, truth: VideoSet, key: str, video: Frames) -> dict[str, float]:
    true = truth.video(key, len(video))[0]
    if video.shape != true.shape:
        raise ValueError(
            f"{videos.folder / key}.mp4 is {video.shape[2]}x{video.shape[1]}, the true video "
            f"{true.shape[2]}x{true.shape[1]}; scale the videos to the data's size first"
        )
    return {name: float(f(video[1:], true[1:]).mean()) for name, f in (("psnr_db", image.psnr), ("ssim", image.ssim))}


def _structure(
    job: Job, look: Look, count: int, fps: float, cuts: list[int], path: Path | None
) -> tuple[dict[str, float], Array | None]:
    """Values of `poses.reconstructed` and the estimated path of every frame, NaN between keyframes."""
    import torch

    from vgr.geometry.cameras import interpolate

    if not (settings := job.protocol.get("pose")):
        return {}, None
    at = poses.keyframes(cuts, count, fps, settings)
    values, est = poses.reconstructed(look(), at, fps, path, settings)
    if est is None:
        return values, None
    every, known = np.full((count, 4, 4), np.nan), np.isfinite(est).all((1, 2))
    if known.sum() > 1:
        own = np.array(at)[known]
        between = torch.arange(own[0], own[-1] + 1)
        every[between] = interpolate(torch.from_numpy(est[known]), torch.from_numpy(own), between).numpy()
    return values, every


def all_features(
    job: Job, video: Frames, shuffle: np.random.Generator | None = None, chance: np.random.Generator | None = None
) -> dict[str, Array]:
    """Distance -> features (rows, D) of a video without its first frame: of windows, or of one clip for networks.

    shuffle: with the frames of each window or clip shuffled. chance: draws where a true video's clip starts.
    """
    def mixed(clip: Frames) -> Frames:
        return shuffle.permutation(clip) if shuffle else clip

    windows = features.windows(video[1:], job.protocol["frechet"]["window_frames"])
    found = {FD: np.array([features.clip_features(mixed(w)) for w in windows])}
    for name, network in job.extractors.items():
        clip = clip_of(video[1:], network.frames, job.protocol["fvd"]["stride"], chance)
        found[name] = np.zeros((0, 0)) if clip is None else network.features(mixed(clip)[None])
    return found


@functools.cache
def _code() -> str:
    """A hash of the code that measures: numbers of other code are measured again."""
    here = File(__file__).parent
    files = [*sorted((here.parent / "metrics").glob("*.py")), here / "measure.py", here / "poses.py"]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _write(place: File, mark: str, found: Measured) -> None:
    head: dict[str, Any] = {"mark": mark, "values": found.values, "features": list(found.features)}
    arrays = {f"features.{name}": x for name, x in found.features.items()}
    if (trend := found.drift) is not None:
        head["drift"] = {"slope": trend.slope, "level": trend.level, "start_end": trend.start_end}
        arrays |= {"times": trend.times_J, "steps": trend.steps, **{f"curve.{k}": x for k, x in trend.curve.items()}}
    with atomic(place) as file:
        np.savez(file, head=np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays)


def _read(place: File, key: str, mark: str) -> Measured | None:
    """What `_write` kept, None where there is nothing or something measured otherwise."""
    if not place.is_file():
        return None
    with np.load(place, allow_pickle=False) as file:
        head = json.loads(file["head"].tobytes())
        if head["mark"] != mark:
            return None
        trend = None
        if told := head.get("drift"):
            curve = {name: file[f"curve.{name}"] for name in told["slope"]}
            trend = drift_.Drift(**told, times_J=file["times"], curve=curve, steps=file["steps"])
        return Measured(key, head["values"], trend, {name: file[f"features.{name}"] for name in head["features"]})
