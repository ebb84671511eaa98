"""Do reconstructed cameras match the engine's? VizDoom walks at 640x480 have exact ones; what breaks it, in a table.

    python -m benchmarks.poses --out benchmarks/results/poses_doom.json

Ten held-out walks that travel (a metre or more), written as mp4 and read again, taken in order of their index whatever
comes back, then shots made to fail: walks on the spot ("look"), frames darkened to little contrast, and one frame shown
again and again. A walk is well where every frame is registered, rotations are within 0.1 degrees on average after
alignment by rotations, and positions within 1 % of the path's length on average. Seconds are wall time of one
thread; cpu_s, the process's own, tells whether the machine was shared.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vgr.data.doom import DoomSource
from vgr.data.files import write_json
from vgr.data.video import Clip, encode_video, read_video
from vgr.geometry.reconstruct import reconstruct
from vgr.metrics.camera_pose import pose_errors, trajectory_errors

SIZE_HW, DEGREES, PERCENT, METRES = (480, 640), 0.1, 1.0, 1.0


def clips(frames: int, seed: int) -> Iterator[tuple[int, Clip, float]]:
    """Visits of one clip each, its frames through an mp4, with the length of their path in metres."""
    source, visit = DoomSource(frames, SIZE_HW, clips_per_visit=1), 0
    while True:
        clip = source.capture(seed, "val", visit)[0]
        clip = replace(clip, frames=read_video(encode_video(clip.frames, clip.fps))[0])
        yield visit, clip, float(np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1).sum())
        visit += 1


def row(what: str, visit: int, clip: Clip, frames: np.ndarray, c2w: np.ndarray, mapper: str) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = reconstruct(frames, clip.intrinsics[0], mapper=mapper)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    length = float(np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1).sum())
    told = {"case": what, "visit": visit, "map": clip.source["map"], "mood": clip.source["mood"], "path_m": length,
            "motion": found.motion, "registered": found.registered, "reprojection_px": found.reprojection_px,
            "confidence": found.confidence, "agreement": found.agreement, "reason": found.reason,
            "wall_s": wall, "cpu_s": cpu}  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/poses_doom.json"))
    parser.add_argument("--walks", type=int, default=10)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--only-walks", action="store_true", help="without the shots made to fail")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mapper", default="global")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def add(*told: Any) -> None:
        rows.append(row(*told, args.mapper))
        walks = [r for r in rows if r["case"] == "walk"]
        good = sum(r["well"] for r in walks)
        write_json(args.out, {
            "settings": {k: str(v) for k, v in vars(args).items()}, "size_hw": SIZE_HW, "cores": os.cpu_count(),
            "load_at_end": os.getloadavg()[0], "walks": len(walks), "well": good, "rows": rows,
        })  # fmt: skip
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)

    walked = 0
    for visit, clip, length in clips(args.frames, args.seed):
        if length < METRES:
            if not args.only_walks:
                add("on the spot", visit, clip, clip.frames, clip.c2w)
            continue
        add("walk", visit, clip, clip.frames, clip.c2w)
        walked += 1
        if walked == 1 and not args.only_walks:
            dark = (clip.frames.astype(np.float32) * 0.04).round().astype(np.uint8)
            add("little contrast", visit, clip, dark, clip.c2w)
            still = [clip.frames[:1].repeat(9, 0), clip.c2w[:1].repeat(9, 0)]
            add("no motion", visit, clip, *still)
        if walked == args.walks:
            return


if __name__ == "__main__":
    main()
