"""Speed of generation: first frame, frames a second (benchmarks spec, section 7)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

Timing = dict[str, float]


def measure_requests(requests: Sequence[Callable[[], tuple[np.ndarray, Timing]]], warmup: int = 1) -> list[Timing]:
    """Run every request, one after another, and return one timing each, after `warmup` untimed calls of the first.

    A request returns (videos_BFHWC, the generator's own timings). Wall time and frames are taken here, from
    the clock and from the decoded video, not from what the generator says.
    """
    for _ in range(warmup):
        requests[0]()
    timings = []
    for request in requests:
        start = time.perf_counter()
        videos, own = request()  # decoded videos are on the host: the device has finished
        wall = time.perf_counter() - start
        timings.append({**own, "wall_s": wall, "frames": int(videos.shape[0] * videos.shape[1])})
    return timings


def summarize(timings: Sequence[Timing]) -> dict[str, list[float]]:
    """Per-request values by metric name, from timings with wall_s, frames, first_frame_s, denoise_s, as far as given.

    first_frame_s: request to first decoded frame. frames_per_s: all frames by the whole time, text encoding
    and decoding included. denoise_frames_per_s: by denoising alone.
    """
    found = {
        "first_frame_s": [t["first_frame_s"] for t in timings if t.get("first_frame_s")],
        "frames_per_s": [t["frames"] / t["wall_s"] for t in timings if t.get("wall_s")],
        "denoise_frames_per_s": [t["frames"] / t["denoise_s"] for t in timings if t.get("denoise_s")],
    }
    return {name: values for name, values in found.items() if values}
