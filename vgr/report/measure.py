"""Measure the videos of a set: one table of numbers, trends and features per video, kept so that nothing is done twice.

What stands in `kept` was measured from the same bytes by the same code and settings, so many processes can share the
work (each its `part`), and the last one to come finds all of it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path as File
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgr.data.files import write_text
from vgr.data.filters import Meter
from vgr.data.video import iter_video
from vgr.geometry.camera_file import arrays
from vgr.metrics import drift as drift_
from vgr.metrics import features, image, shots, vbench
from vgr.metrics.extractors import Extractor, clip_of
from vgr.metrics.revisit import measure_revisit
from vgr.report.judges import Judge
from vgr.report.sets import VideoSet, fingerprint
from vgr.report.table import FD, POSE_ERRORS
from vgr.seeding import derive_seed

if TYPE_CHECKING:
    from vgr.geometry.reconstruct import Reconstruction

Array = NDArray[np.float64]
Frames = NDArray[np.uint8]
Path = tuple[Array, Array]  # c2w (F,4,4) and intrinsics (F,4)


class Measured(NamedTuple):
    """Of one video: metric -> value, its drift (None if too short), distance -> features (rows, D) and the key."""

    key: str
    values: dict[str, float]
    drift: drift_.Drift | None
    features: dict[str, Array]


class Job(NamedTuple):
    """What all videos of a run share: protocol, frames measured (None: each video whole), extractors by metric, judges
    of frames by name, folder of what is measured already, part (i of n, from 0) and done(n)."""

    protocol: dict[str, Any]
    frames: int | None
    extractors: Mapping[str, Extractor]
    judges: Mapping[str, Judge]
    kept: File
    part: tuple[int, int]
    done: Callable[[int], None]


class Video(NamedTuple):
    """One video: its set's info; `look()` gives its frames from the first; their count, their rate, the cuts."""

    key: str
    info: dict[str, Any]
    look: Callable[[], Iterable[Frames]]
    count: int
    fps: float
    cuts: list[int]


def measure_set(
    job: Job, row: str, videos: VideoSet, keys: Sequence[str], truth: VideoSet | None = None,
    paths: Mapping[str, Sequence[Path]] | None = None,
) -> list[Measured]:  # fmt: skip
    """Measure this part of a set's videos, in the order of keys; of the row "reference" features alone, true clips'.

    truth None leaves PSNR and SSIM out. paths gives a key's commanded (c2w, intrinsics), nothing leaves the pose out;
    errors against a second path are called other_<metric>. The first frame, given to the model, counts for the pose
    alone. Raises ValueError when sizes differ from the truth's.
    """
    settings = {"protocol": job.protocol["sha256"], "frames": job.frames, "code": _code(),
                "weights": {name: x.about for name, x in {**job.extractors, **job.judges}.items()}}  # fmt: skip

    def one(index: int) -> Measured:
        key, info = keys[index], videos.info
        own = (paths or {}).get(key, ())
        files = [s.folder / f"{key}.mp4" for s in (videos, truth) if s is not None]
        files += [x for x in (videos.folder / f"{key}.{kind}.npz" for kind in ("features", "poses")) if x.is_file()]
        data = [x.read_bytes() for x in files]
        told: list[Any] = [hashlib.sha256(x).hexdigest() for x in (*data, *(a.tobytes() for p in own for a in p))]
        told += [info.get("fps"), info.get("chunk_starts")]
        told += [info.get(name, {}).get(key) for name in ("cuts", "changes", "captions", "returns")]
        mark, place = fingerprint({**settings, "inputs": told}), job.kept / row / f"{key}.json"
        found = _read(place, key, mark)
        if found is None:
            found = _measure(job, row, videos, key, index, truth, own)
            trend = found.drift and found.drift._asdict()
            kept = {"mark": mark, "values": found.values, "drift": trend, "features": found.features}
            write_text(place, json.dumps(kept, default=np.ndarray.tolist))
        job.done(1)
        return found

    with ThreadPoolExecutor(2) as pool:  # OpenCV and PyAV release the interpreter lock
        return list(pool.map(one, range(job.part[0], len(keys), job.part[1])))


def _read(place: File, key: str, mark: str) -> Measured | None:
    """What was kept of a video, None where that is nothing or was measured otherwise."""
    kept = json.loads(place.read_text()) if place.is_file() else {}
    if kept.get("mark") != mark:
        return None
    trend = kept["drift"]
    if trend is not None:
        trend |= {name: np.array(trend[name]) for name in ("times_J", "steps")}
        trend = drift_.Drift(**trend | {"curve": {name: np.array(x) for name, x in trend["curve"].items()}})
    return Measured(key, kept["values"], trend, {name: np.array(x) for name, x in kept["features"].items()})


@functools.cache
def _code() -> str:
    """A hash of the code that measures: numbers of other code are measured again."""
    here = File(__file__)
    folders = (here.parents[1] / name for name in ("metrics", "geometry"))
    files = [*(file for x in folders for file in sorted(x.glob("*.py"))), here.with_name("judges.py"), here]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _measure(
    job: Job, row: str, videos: VideoSet, key: str, index: int, truth: VideoSet | None, paths: Sequence[Path]
) -> Measured:
    if job.frames is None:
        place = videos.folder / f"{key}.mp4"
        count, fps, cuts = _scan(iter_video(place), "shots" in job.protocol)
        rate = float(videos.info.get("fps") or fps)
        seen = Video(key, videos.info, lambda: (frame for frame, _ in iter_video(place)), count, rate, cuts)
        values, trend = _trends(job, seen)
        return Measured(key, values | _structure(job, videos, seen, paths)[0], trend, {})
    video, fps = videos.video(key, job.frames)
    chance = np.random.default_rng(derive_seed(job.protocol["seed"], "clip", index))
    if row == "reference":
        return Measured(key, {}, None, all_features(job, video, start=chance))
    cuts = _scan(((f, i / fps) for i, f in enumerate(video)), True)[2] if "shots" in job.protocol else []
    seen = Video(key, videos.info, lambda: video, len(video), fps, cuts)
    values, trend = _trends(job, seen)
    if truth is not None:
        true = truth.video(key, job.frames)[0]
        if video.shape != true.shape:
            raise ValueError(
                f"{videos.folder / key}.mp4 is {video.shape[2]}x{video.shape[1]}, the true video "
                f"{true.shape[2]}x{true.shape[1]}; scale the videos to the data's size first"
            )
        values["psnr_db"] = float(image.psnr(video[1:], true[1:]).mean())
        values["ssim"] = float(image.ssim(video[1:], true[1:]).mean())
        if "quality" in job.protocol:
            values["ssim_uniform"] = float(image.ssim(video[1:], true[1:], uniform=True).mean())
        if "lpips" in job.judges:
            values["lpips"] = float(job.judges["lpips"].frames(video[1:], true[1:]).mean())
    if "quality" in job.protocol:
        values |= _quality(job, videos, key, video, fps)
    for prefix, scores in zip(("", "other_"), pose_values(video, paths) if paths else ()):
        values.update({prefix + k: v for k, v in scores.items()})
    more, estimate = _structure(job, videos, seen, paths)
    values |= more
    if paths and "revisit" in job.protocol:
        lpips = job.judges["lpips"].frames if "lpips" in job.judges else None
        found = measure_revisit(video, paths[0][0], fps, estimate, job.protocol["revisit"]["gap_s"], lpips)
        values |= {"revisit_db": found.psnr_db, "memory_db": found.memory_db, "memory_ssim": found.memory_ssim}
        values |= {"revisit_ssim_uniform": found.ssim_uniform, "revisit_lpips": found.lpips}
        pairs = found.pairs + found.dropped
        values["return_dropped"] = found.dropped / pairs if pairs and estimate is not None else np.nan
    table = all_features(job, video)
    if row == "truth":  # the control of distances' sense of time
        table |= {f"shuffled {name}": x for name, x in all_features(job, video, shuffle=chance).items()}
    return Measured(key, values, trend, table)


def _quality(job: Job, videos: VideoSet, key: str, video: Frames, fps: float) -> dict[str, float]:
    """VBench's dimensions and the CLIP score, 100 x cosine of frames and their shot's caption, at least 0, of all and
    by caption: as far as judges or the features beside the video allow; the control is the next video's captions."""
    place, info = videos.folder / f"{key}.features.npz", videos.info
    given = arrays(place, set(vbench.SHAPES)) if place.is_file() else {}
    made = {"subject": "dino", "background": "clip"}
    given |= {k: job.judges[by].frames(video) for k, by in made.items() if by in job.judges and k not in given}
    try:
        values = vbench.scores(video, given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    starts = [0, *info.get("cuts", {}).get(key, [])]
    if "subject" in given and len(starts) > 1 and starts[-1] < len(video):
        values |= shots.shot_consistency(given["subject"], starts, info.get("returns", {}).get(key, []))
    if "imaging" in given:
        window = max(1, round(job.protocol["drift"]["window_s"] * fps))
        first, last = (float(np.mean(x)) for x in (given["imaging"][:window], given["imaging"][-window:]))
        values |= {"imaging_first": first, "imaging_last": last, "imaging_drop": first - last}
    captions, names = info.get("captions", {}), info.get("clips", [])
    if "clip" in job.judges and key in captions:
        at = np.arange(0, len(video), max(1, round(fps / job.protocol["quality"]["clip_per_s"])))
        shot = np.searchsorted(info.get("changes", info.get("cuts", {})).get(key, []), at, side="right")
        other = captions[names[(names.index(key) + 1) % len(names)]]
        seen = job.judges["clip"].frames(video[at])
        for name, told in (("clip_score", captions[key]), ("clip_score_other", other)):
            text = job.judges["clip"].text(list(told))[np.minimum(shot, len(told) - 1)]
            cosine = (seen * text).sum(1) / (np.linalg.norm(seen, axis=1) * np.linalg.norm(text, axis=1))
            values[name] = float(100 * cosine.clip(0).mean())
            for i in np.unique(shot) if name == "clip_score" and len(told) > 1 else ():
                values[f"clip_score_{i + 1}"] = float(100 * cosine[shot == i].clip(0).mean())
    return values


def _scan(frames: Iterable[tuple[Frames, float]], find_cuts: bool) -> tuple[int, float, list[int]]:
    """Frames, their rate and the cuts of a video that passes once."""
    import cv2

    meter, times = Meter(), []
    for frame, time_s in frames:
        times.append(time_s)
        if find_cuts:
            width = max(16, round(48 * frame.shape[1] / frame.shape[0]))
            meter.add(cv2.resize(frame, (width, 48), interpolation=cv2.INTER_AREA))
    meter.done()
    return len(times), (len(times) - 1) / max(times[-1] - times[0], 1e-9), meter.cuts


def _trends(job: Job, seen: Video) -> tuple[dict[str, float], drift_.Drift | None]:
    """Of cuts and of trends within shots."""
    values: dict[str, float] = {}
    if "shots" in job.protocol:
        values["cuts"] = float(len(seen.cuts))
        if (wanted := seen.info.get("cuts", {}).get(seen.key)) is not None:
            wanted = [c for c in wanted if c < seen.count]
            values["sca"] = shots.shot_cut_accuracy(seen.cuts, wanted, seen.count)
    window, cuts = job.protocol["drift"]["window_s"], [c - 1 for c in seen.cuts if c > 1]
    longest = np.diff([0, *cuts, seen.count - 1]).max() / seen.fps
    if longest + 1e-6 < 3 * window:
        return values, None
    trend = drift_.measure_drift(islice(iter(seen.look()), 1, None), seen.fps, window, cuts)
    for name in drift_.UNITS:
        values |= {f"{name}_per_s": trend.slope[name], f"{name}_end_minus_start": trend.start_end[name]}
    values |= {"motion_level": trend.level["motion"], "stagnation": drift_.stagnation(trend.curve["motion"])}
    if starts := seen.info.get("chunk_starts"):
        values["seam_ratio"] = drift_.seam_ratio(trend.steps, [s - 1 for s in starts if s > 1])
    return values, trend


def pose_values(video: Frames, paths: Sequence[Path]) -> list[dict[str, float]]:
    """The camera errors of one video against each (c2w, intrinsics); the flow is read once, with the first's."""
    from vgr.metrics.egomotion import flow_rotation, score_motion

    found = flow_rotation(video, paths[0][1])
    scores = [score_motion(found, c2w) for c2w, _ in paths]
    return [{**{k: float(s[k]) for k in POSE_ERRORS}, "pose_coverage": float(s["coverage"])} for s in scores]


def _structure(
    job: Job, videos: VideoSet, seen: Video, paths: Sequence[Path]
) -> tuple[dict[str, float], Array | None]:
    """What structure from motion of the longest shot's keyframes gives, and every frame's camera, interpolated; in its
    place cameras that another estimator found, <key>.poses.npz: c2w (F,4,4), NaN where it found none.

    With a commanded path come errors, ours and by every published convention, and its intrinsics where they do not
    change. Nothing below `least_height`; a reconstruction with a reason not to use it counts as not registered.
    """
    import torch

    from vgr.geometry.cameras import interpolate
    from vgr.metrics.camera_pose import pose_errors
    from vgr.metrics.pose_conventions import KEYS, published_errors

    settings, edges = job.protocol.get("pose"), [0, *seen.cuts, seen.count]
    place = videos.folder / f"{seen.key}.poses.npz"
    if settings is None or not place.is_file() and importlib.util.find_spec("pycolmap") is None:
        return {}, None
    start, end = max(zip(edges, edges[1:]), key=lambda shot: shot[1] - shot[0])
    at = list(range(start, end, max(1, round(seen.fps / settings["per_s"]))))[: settings["frames"]]
    if paths and len(paths[0][0]) < seen.count:
        raise ValueError(f"{seen.key}.mp4 has {seen.count} frames and {len(paths[0][0])} cameras; give one a frame")
    if place.is_file():
        given = arrays(place, {"c2w"}, np.float64).get("c2w", np.zeros(0))
        if given.shape != (seen.count, 4, 4):
            raise ValueError(f"{place}: c2w has the shape {given.shape}; {(seen.count, 4, 4)} is needed")
        est, fov = given[at], None
    elif len(at) < 3 or next(iter(seen.look())).shape[0] < settings["least_height"]:
        return {}, None
    else:
        found = _reconstructed(seen, at, settings["long_side"], paths)
        est = np.full_like(found.c2w, np.nan) if found.reason else found.c2w
        fov = float(np.rad2deg(2 * np.arctan(0.5 / found.intrinsics[0])))
    known = np.isfinite(est).all((1, 2))
    values, every = {"sfm_coverage": float(known.mean())}, np.full((seen.count, 4, 4), np.nan)
    values["sfm_given"] = float(fov is None)
    if known.sum() > 1:
        values |= {} if fov is None else {"sfm_fov_deg": fov}
        own = torch.tensor(at)[torch.from_numpy(known)]
        between = torch.arange(int(own[0]), int(own[-1]) + 1)
        every[between] = interpolate(torch.from_numpy(est[known]), own, between).numpy()
    if paths:
        errors = pose_errors(est, paths[0][0][at])
        values |= {key: float(errors[key]) for key in ("rot_imputed_deg", "trans_imputed", "path_length_ratio")}
        for name, keys in KEYS.items():
            errors = published_errors(est, paths[0][0][at], name)
            values |= {f"{name}_{key}": float(errors[key]) for key in keys}
    return values, every


def _reconstructed(seen: Video, at: list[int], long_side: int, paths: Sequence[Path]) -> Reconstruction:
    """Of the frames `at`, reduced to long_side, with the commanded intrinsics where they do not change."""
    import cv2

    from vgr.geometry.reconstruct import reconstruct

    small, wanted = [], set(at)
    for frame in (f for i, f in enumerate(islice(iter(seen.look()), at[-1] + 1)) if i in wanted):
        scale = min(1.0, long_side / max(frame.shape[:2]))
        size = tuple(round(scale * s) for s in frame.shape[1::-1])
        small.append(cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame)
    fixed = paths and np.ptp(paths[0][1][at], axis=0).max() < 1e-6
    return reconstruct(np.stack(small), paths[0][1][at[0]] if fixed else None)


def all_features(
    job: Job, video: Frames, shuffle: np.random.Generator | None = None, start: np.random.Generator | None = None
) -> dict[str, Array]:
    """Distance -> features (rows, D) of a video without its first frame: of windows, or of one clip for networks.

    shuffle: with the frames of each window or clip shuffled. start: draws where a true video's clip starts.
    """
    def mixed(clip: Frames) -> Frames:
        return shuffle.permutation(clip) if shuffle else clip

    windows = features.windows(video[1:], job.protocol["frechet"]["window_frames"])
    found = {FD: np.array([features.clip_features(mixed(w)) for w in windows])}
    for name, network in job.extractors.items():
        clip = clip_of(video[1:], network.frames, job.protocol["fvd"]["stride"], start)
        found[name] = np.zeros((0, 0)) if clip is None else network.features(mixed(clip)[None])
    return found
