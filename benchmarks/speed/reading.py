"""How fast videos are read, scanned and encoded: ours beside plain PyAV and OpenCV, on one file made here.

python -m benchmarks.speed.reading --out benchmarks/results/speed_reading_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vgr.data.files import write_json
from vgr.data.folder import FolderSource
from vgr.data.prepare import encode
from vgr.data.video import at_rate, iter_frames, write_video
from vgr.models.codec import CosineCodec


def film(frames: int, height: int, width: int) -> np.ndarray:
    """Coloured noise that drifts: hard to compress, as foliage is."""
    import cv2

    rng = np.random.default_rng(0)
    layers = [cv2.resize(rng.integers(0, 256, (height // s, 2 * width // s, 3), np.uint8), (2 * width, height))
              for s in (4, 16, 64)]
    still = np.mean(layers, axis=0).astype(np.uint8)
    return np.stack([still[:, 3 * f : 3 * f + width] for f in range(frames)])


def plain_pyav(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return len([frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)])


def plain_opencv(path: Path, size_hw: tuple[int, int] | None) -> int:
    import cv2

    video, count = cv2.VideoCapture(str(path)), 0
    while (read := video.read())[0]:
        image = cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)
        if size_hw:
            cv2.resize(image, size_hw[::-1], interpolation=cv2.INTER_AREA)
        count += 1
    return count


def best(work: Callable[[], int], repeats: int) -> dict[str, float]:
    """Frames a second of the file: the best and the middle of so many tries."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - start))
    return {"best_frames_per_s": max(rates), "median_frames_per_s": float(np.median(rates))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    size, fps, frames = (96, 128), 30.0, args.frames
    with tempfile.TemporaryDirectory() as folder:
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

        rows = {
            "pyav_decode_to_rgb": lambda: plain_pyav(path),
            "opencv_decode_to_rgb": lambda: plain_opencv(path, None),
            "opencv_decode_and_resize": lambda: plain_opencv(path, size),
            "ours_decode_to_rgb": lambda: len([x.rgb().shape for x in iter_frames(path)]),
            "ours_decode_and_fit": lambda: len([x.rgb(size).shape for x in iter_frames(path)]),
            "ours_decode_fit_at_half_rate": resampled,
            "ours_scan_at_half_rate": scanned,
            "ours_encode_cosine": encoded,
        }
        found = {name: best(work, args.repeats) for name, work in rows.items()}
        file_bytes = path.stat().st_size
    result = {
        "file": {"frames": frames, "size_hw": [720, 1280], "fps": fps, "codec": "h264", "bytes": file_bytes},
        "size_hw": size, "rows": found, "repeats": args.repeats,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, shared with other work",
        "load": os.getloadavg(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
