"""Our metrics beside the libraries people compute them with: same inputs, values compared before anything is timed.

    python -m benchmarks.speed.metrics --out benchmarks/results/speed_metrics_cpu.json

A case's two sides run in turn, each `calls` times a turn, so that a turn is no instant; ratios are of adjacent pairs,
peer / ours of a call: above 1, ours is faster. Where values differ by more than the case's tolerance there is no ratio.
evo (GPL) runs in a process of its own and tells the seconds it spent inside. Theil-Sen slopes are all that
`measure_drift` does after the frames' statistics, beside scipy.stats.theilslopes of the same windows' means alone.
`memory` streams a long video through `measure_drift` in a process that imports nothing else.

Left out: BCa intervals, since `mean_interval` is scipy.stats.bootstrap's call.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.speed.metric_cases import CASES, Case, Frames, films
from vgr.data.files import write_json

TURN_S = 0.1  # least seconds a side's turn should take
FPS, WINDOW_S = 16, 1.0


def compare(case: Case, repeats: int) -> dict[str, Any]:
    """The row of a case: values first, then both sides in turn."""
    row: dict[str, Any] = {"case": case.name, "input": case.input, "peer": case.peer, "tolerance": case.tolerance}
    told = f"{case.name:10s} {case.input:32s} {case.peer:12s}"
    if case.theirs is None:
        print(f"{told} unavailable", flush=True)
        return row | {"unavailable": True}
    first = {"peer": case.theirs(1), "ours": case.ours(1)}
    theirs, ours = (values for _, values in first.values())
    apart = float((np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-12)).max())
    row |= {"apart": apart if math.isfinite(apart) else None, "agree": apart <= case.tolerance}
    if not row["agree"]:
        print(f"{told} values differ by {apart:.1e}, more than {case.tolerance:.0e}: no ratio", flush=True)
        return row
    sides = {"peer": case.theirs, "ours": case.ours}
    once = {name: taken if taken > TURN_S else sides[name](1)[0] for name, (taken, _) in first.items()}
    calls = {name: max(1, min(1000, math.ceil(TURN_S / max(taken, 1e-9)))) for name, taken in once.items()}
    pairs = [tuple(side(calls[name])[0] / calls[name] for name, side in sides.items()) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    row |= {
        "calls": calls, "pairs": len(pairs),
        "peer_s": median(a for a, _ in pairs), "ours_s": median(b for _, b in pairs),
        "ratio_median": median(ratios), "ratio_min": ratios[0], "ratio_max": ratios[-1],
    }  # fmt: skip
    row["never_slower"] = row["ratio_median"] >= 1
    print(f"{told} peer {row['peer_s']:.3g} s  ours {row['ours_s']:.3g} s  ratio {row['ratio_median']:.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})  goal: never slower: {'met' if row['never_slower'] else 'missed'}",
          flush=True)  # fmt: skip
    return row


def resident(what: str = "VmRSS") -> float:
    """This process's memory, MB: VmRSS now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


def long_video(minutes: float, size_hw: tuple[int, int] = (96, 128)) -> dict[str, Any]:
    """This process's memory while `measure_drift` reads a video made on the fly: at a tenth, at the last frame, and
    the most, which the windows' means may need after the last frame."""
    from vgr.metrics.drift import measure_drift

    count, told = round(60 * minutes * FPS), {}
    still = films(1, *size_hw)[0][0]

    def frames() -> Iterator[Frames]:
        for i in range(count):
            if i in (count // 10, count - 1):
                told["at_tenth_mb" if i < count - 1 else "at_end_mb"] = resident()
            yield np.roll(still, i, axis=1) // 2 + np.uint8(i * 100 // count)

    measure_drift(frames(), FPS, WINDOW_S)
    told |= {"most_mb": resident("VmHWM"), "ratio": told["at_end_mb"] / told["at_tenth_mb"]}
    return {"minutes": minutes, "frames": count, "size_hw": size_hw} | told


def memory(minutes: float) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(long_video, minutes).result()
    print(f"memory     {found['frames']} frames: {found['at_tenth_mb']:.0f} MB at a tenth, {found['at_end_mb']:.0f} MB "
          f"at the end, {found['ratio']:.3f} times; at most {found['most_mb']:.0f} MB", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=10.0, help="of the video whose memory is watched")
    parser.add_argument("--only", nargs="*", default=[*CASES, "memory"], choices=[*CASES, "memory"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()
    watched = memory(args.minutes) if "memory" in args.only else None
    rows = [compare(case, args.repeats) for name, make in CASES.items() if name in args.only for case in make()]
    import cv2
    import torch

    packages = ("torch", "torchmetrics", "numpy", "scipy", "opencv-python-headless", "evo", "scikit-image")
    there = {x.metadata["Name"]: x.version for x in metadata.distributions()}
    found = {
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "load": load,
        "threads": {"torch": torch.get_num_threads(), "opencv": cv2.getNumThreads(),
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "versions": {p: there[p] for p in packages if p in there} | {"python": platform.python_version()},
        "rows": rows, "memory": watched,
    }  # fmt: skip
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
