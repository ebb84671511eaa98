"""Do reconstructed cameras match the engine's? VizDoom walks at 640x480 have exact ones; what breaks it, in a table.

    python -m benchmarks.poses --out benchmarks/results/poses_doom.json
    python -m benchmarks.poses --walks 2 --broken --out benchmarks/results/poses_doom_broken.json

Ten held-out walks that travel (a metre or more), written as mp4 and read again, taken in order of their index whatever
comes back. A walk is well where every frame is registered, rotations are within 0.1 degrees on average after alignment
by rotations, and positions within 1 % of the path's length on average. --broken: the same walks made worse, see
`WORSE`, and visits that stay on the spot. Walks are shared out to `--workers` processes of one thread each; cpu_s is a
walk's own processor time, wall_s what it took beside the others, seconds_a_walk the whole run over its walks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vgr.data.doom import DoomSource
from vgr.data.files import write_json
from vgr.data.prepare import in_order
from vgr.data.video import Clip, encode_video, read_video
from vgr.geometry.reconstruct import reconstruct
from vgr.metrics.camera_pose import pose_errors, trajectory_errors

SIZE_HW, DEGREES, PERCENT, METRES = (480, 640), 0.1, 1.0, 1.0
Frames = np.ndarray


def through_mp4(frames: Frames, fps: float, crf: int = 18) -> Frames:
    return read_video(encode_video(frames, fps, crf=crf))[0]


def noisy(frames: Frames, deviation: float) -> Frames:
    noise = np.random.default_rng(0).standard_normal(frames.shape, np.float32)
    return (frames + deviation * noise).round().clip(0, 255).astype(np.uint8)


def crossed(frames: Frames, share: float) -> Frames:
    """A textured square of that share of the picture crosses it from left to right: a thing that moves by itself."""
    count, height, width = frames.shape[:3]
    side, out = round((share * height * width) ** 0.5), frames.copy()
    square = np.random.default_rng(0).integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), np.uint8)
    square = square.repeat(8, 0).repeat(8, 1)[:side, :side]
    top = (height - side) // 2
    for i, frame in enumerate(out):
        left = round(i / max(1, count - 1) * (width + side)) - side
        a, b = max(left, 0), min(left + side, width)
        frame[top : top + side, a:b] = square[:, a - left : b - left]
    return out


def blurred(frames: Frames) -> Frames:
    """Each frame the mean of itself and its two neighbours, as an open shutter makes it."""
    at = np.arange(len(frames))[:, None] + np.array([-1, 0, 1])
    return frames[at.clip(0, len(frames) - 1)].mean(1).round().astype(np.uint8)


# Frames that stay of a clip, and what is done to them.
WORSE: dict[str, tuple[slice, Callable[[Frames, float], Frames]]] = {
    "one frame again and again": (slice(0, 9), lambda x, fps: x[:1].repeat(len(x), 0)),
    "4 % of the contrast": (slice(None), lambda x, fps: (x * 0.04).round().astype(np.uint8)),
    "25 % of the contrast": (slice(None), lambda x, fps: (x * 0.25).round().astype(np.uint8)),
    "noise of deviation 10": (slice(None), lambda x, fps: noisy(x, 10)),
    "noise of deviation 30": (slice(None), lambda x, fps: noisy(x, 30)),
    "h264 at crf 35": (slice(None), lambda x, fps: through_mp4(x, fps, 35)),
    "h264 at crf 45": (slice(None), lambda x, fps: through_mp4(x, fps, 45)),
    "mean of three frames": (slice(None), lambda x, fps: blurred(x)),
    "every second frame": (slice(None, None, 2), lambda x, fps: x),
    "every fourth frame": (slice(None, None, 4), lambda x, fps: x),
    "a moving square, 10 % of the picture": (slice(None), lambda x, fps: crossed(x, 0.1)),
    "a moving square, 40 % of the picture": (slice(None), lambda x, fps: crossed(x, 0.4)),
    "backwards": (slice(None, None, -1), lambda x, fps: x),
}


def row(what: str, visit: int, clip: Clip, frames: Frames, c2w: np.ndarray, mapper: str) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = reconstruct(frames, clip.intrinsics[0], mapper=mapper)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    length = path_length(c2w)
    told = {"case": what, "visit": visit, "map": clip.source["map"], "mood": clip.source["mood"], "path_m": length,
            "frames": len(frames), "motion": found.motion, "registered": found.registered,
            "reprojection_px": found.reprojection_px, "confidence": found.confidence, "agreement": found.agreement,
            "reason": found.reason, "wall_s": wall, "cpu_s": cpu}  # fmt: skip
    if np.isfinite(found.c2w).any():
        errors = pose_errors(found.c2w, c2w)
        told |= {"rot_mean_deg": errors["rot_mean_deg"], "trans_mean_m": errors["trans_mean"]}
        told["ate_rmse_m"] = trajectory_errors(found.c2w, c2w, align="rotation_mean")["ate_rmse"]
        if length > 0:
            told["trans_percent"] = 100 * errors["trans_mean"] / length
    told["well"] = bool(
        found.registered == 1 and not found.reason and told["rot_mean_deg"] < DEGREES
        and told.get("trans_percent", np.inf) < PERCENT
    )  # fmt: skip
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in told.items()}


def path_length(c2w: np.ndarray) -> float:
    return float(np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1).sum())


def measure(frames: int, seed: int, mapper: str, broken: bool, visit: int) -> list[dict[str, Any]]:
    """Rows of one visit: a walk, and with broken made worse, or a stay on the spot, which counts with broken only."""
    clip = DoomSource(frames, SIZE_HW, clips_per_visit=1).capture(seed, "val", visit)[0]
    clip = replace(clip, frames=through_mp4(clip.frames, clip.fps))
    if path_length(clip.c2w) < METRES:
        return [row("on the spot", visit, clip, clip.frames, clip.c2w, mapper)] if broken else []
    rows = [row("walk", visit, clip, clip.frames, clip.c2w, mapper)]
    for what, (kept, worse) in WORSE.items() if broken else ():
        c2w = clip.c2w[kept] if what != "one frame again and again" else clip.c2w[:1].repeat(9, 0)
        rows.append(row(what, visit, clip, worse(clip.frames[kept], clip.fps), c2w, mapper))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/poses_doom.json"))
    parser.add_argument("--walks", type=int, default=10)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--broken", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mapper", default="global")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    work = partial(measure, args.frames, args.seed, args.mapper, args.broken)
    visits = in_order(work, itertools.count(), args.workers)
    for found in visits:
        rows += found
        walks = [r for r in rows if r["case"] == "walk"]
        write_json(args.out, {
            "settings": {k: str(v) for k, v in vars(args).items()}, "size_hw": SIZE_HW, "cores": os.cpu_count(),
            "load_at_end": os.getloadavg()[0], "versions": {p: version(p) for p in ("pycolmap", "vizdoom", "numpy")}
            | {"python": platform.python_version()}, "walks": len(walks), "well": sum(r["well"] for r in walks),
            "seconds_a_walk": (time.perf_counter() - began) / max(1, len(walks)), "rows": rows,
        })  # fmt: skip
        for told in found:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in told.items()}, flush=True)
        if len(walks) == args.walks:
            visits.close()
            return


if __name__ == "__main__":
    main()
