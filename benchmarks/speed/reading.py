"""How fast videos are read, scanned and encoded: ours beside plain PyAV and OpenCV, on one file made here.

python -m benchmarks.speed.reading --out benchmarks/results/speed_reading_cpu.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np

from vgr.data.files import write_json
from vgr.data.filters import LIMITS
from vgr.data.folder import FolderSource
from vgr.data.prepare import encode
from vgr.data.video import _careful, at_rate, iter_frames, write_video
from vgr.models.codec import CosineCodec


def film(frames: int, height: int, width: int) -> np.ndarray:
    """Coloured noise that drifts: hard to compress, as foliage is."""
    import cv2

    rng = np.random.default_rng(0)
    layers = [cv2.resize(rng.integers(0, 256, (height // s, 2 * width // s, 3), np.uint8), (2 * width, height))
              for s in (4, 16, 64)]
    still = np.mean(layers, axis=0).astype(np.uint8)
    return np.stack([still[:, 3 * f : 3 * f + width] for f in range(frames)])


def plain_pyav(path: Path, careful: bool) -> int:
    """careful: with the flags that give the same arrays as ours; without, quick ones that are a level or so darker."""
    import av

    flags = {"interpolation": _careful()} if careful else {}
    with av.open(str(path)) as container:
        return len([frame.to_ndarray(format="rgb24", **flags).shape for frame in container.decode(video=0)])


def plain_opencv(path: Path, size_hw: tuple[int, int] | None) -> int:
    import cv2

    video, count = cv2.VideoCapture(str(path)), 0
    while (read := video.read())[0]:
        image = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        if size_hw:
            cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_AREA)
        count += 1
    return count


def in_turn(rows: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Of each row and turn, frames a second and milliseconds of processor time a frame, all threads together."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            start, used = time.perf_counter(), time.process_time()
            count = work()
            taken, used = time.perf_counter() - start, time.process_time() - used
            found[name].append((count / taken, 1e3 * used / count))
    return found


def two_processes(folder: Path, path: Path, files: int = 10) -> dict[str, float | list[float]]:
    """Seconds of processor time of a scan of several files, in this process and in its two workers."""
    for i in range(files):
        (folder / f"{i}.mp4").symlink_to(path)
    source = FolderSource(str(folder), 33, (96, 128), 15.0, val_share=0.3, limits=dict.fromkeys(LIMITS))
    told: list[dict[int, float]] = []

    def heard(more: int) -> None:
        own = {os.getpid(), *(child.pid for child in multiprocessing.active_children())}
        fields = {pid: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in own}
        told.append({pid: (int(x[11]) + int(x[12])) / os.sysconf("SC_CLK_TCK") for pid, x in fields.items()})

    source.scan(folder / "scan", 2, heard)
    spent = {pid: told[-1][pid] - told[2][pid] for pid in told[-1]}  # since two files were done: starting costs more
    return {"parent_s": spent.pop(os.getpid()), "workers_s": sorted(spent.values()), "files": files - 2}


def main() -> None:
    import av

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--beside", default="shared with other work", help="what else ran on the machine")
    args = parser.parse_args()
    size, fps, frames = (96, 128), 30.0, args.frames
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "many").mkdir()
        path = Path(folder) / "a.mp4"
        write_video(path, film(frames, 720, 1280), fps, crf=23)
        codec, clip = CosineCodec(stride=(4, 8, 8), luma=(4, 4), chroma=(2, 1)), np.zeros((4, 97, *size, 3), np.uint8)

        def scanned() -> int:
            FolderSource(folder, 33, size, 15.0, val_share=0.5)._measure(path)
            return frames

        def encoded() -> int:
            encode(codec, clip)
            return clip.shape[0] * clip.shape[1]

        def resampled() -> int:
            for _, x in at_rate(iter_frames(path), 15.0):
                x.rgb(size)
            return frames

        same = next(x.rgb() for x in iter_frames(path))
        with av.open(str(path)) as container:
            first = next(container.decode(video=0))
            theirs, quick = (first.to_ndarray(format="rgb24", **x) for x in ({"interpolation": _careful()}, {}))
        rows = {
            "pyav_to_rgb_quick": lambda: plain_pyav(path, False),
            "pyav_to_rgb_same": lambda: plain_pyav(path, True),
            "ours_to_rgb": lambda: len([x.rgb().shape for x in iter_frames(path)]),
            "opencv_to_rgb": lambda: plain_opencv(path, None),
            "opencv_decode_and_resize": lambda: plain_opencv(path, size),
            "ours_decode_and_fit": lambda: len([x.rgb(size).shape for x in iter_frames(path)]),
            "ours_decode_fit_at_half_rate": resampled,
            "ours_scan_at_half_rate": scanned,
            "ours_encode_cosine": encoded,
        }
        found = in_turn(rows, args.repeats)
        scans = two_processes(Path(folder) / "many", path)
        file_bytes = path.stat().st_size
    ratios = {
        name: [(own / rate, used / mine) for (own, mine), (rate, used) in zip(found["ours_to_rgb"], found[name])]
        for name in ("pyav_to_rgb_quick", "pyav_to_rgb_same", "opencv_to_rgb")
    }
    result = {
        "file": {"frames": frames, "size_hw": [720, 1280], "fps": fps, "codec": "h264", "bytes": file_bytes},
        "size_hw": size, "repeats": args.repeats, "same_arrays_as_pyav": bool((same == theirs).all()),
        "quick_minus_same_mean_rgb": np.mean(quick.astype(float) - theirs, axis=(0, 1)).tolist(),
        "rows": {name: {"best_frames_per_s": max(r for r, _ in each), "median_frames_per_s": median(r for r, _ in each),
                        "least_cpu_ms_per_frame": min(ms for _, ms in each)} for name, each in found.items()},
        **{
            title: {name: {"median": median(x), "least": min(x), "most": max(x)}
                    for name, both in ratios.items() for x in ([pair[i] for pair in both],)}
            for i, title in enumerate(("ours_to_rgb_times_as_fast_as", "ours_to_rgb_times_as_thrifty_as"))
        },
        "scan_by_two_processes": scans,
        "versions": {name: version(name) for name in ("av", "opencv-python-headless")},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.beside}",
        "load": os.getloadavg(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
