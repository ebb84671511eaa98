"""Speed of generation: first frame, frames a second, real-time factor, peak memory (benchmarks spec,
section 7).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

Timing = dict[str, float]
Request = Callable[[], tuple[np.ndarray, Timing]]


def measure_requests(
    requests: Sequence[Request], warmup: int = 1, done: Callable[[], None] | None = None
) -> list[Timing]:
    """Run every request, batch 1 and one after another, and return one timing each; warm-ups are not in the
    list.

    A request returns (videos_BFHWC, the generator's own timings). Wall time and frames are taken here, from
    the clock and from the decoded video, not from what the generator says. `warmup` calls of the first
    request come first. Raises ValueError on a generator whose stages take longer than the whole.
    """
    for _ in range(warmup):
        requests[0]()
    timings = []
    _synchronize(reset_peak=True)
    for request in requests:
        _synchronize()
        start = time.perf_counter()
        videos, own = request()
        _synchronize()
        wall = time.perf_counter() - start
        stages = own.get("denoise_s", 0.0) + own.get("decode_s", 0.0)
        if max(stages, own.get("first_frame_s", 0.0)) > 1.05 * wall + 0.01:
            raise ValueError(f"generator reports {stages:.3f} s in stages, but the call took {wall:.3f} s")
        timings.append({**own, "wall_s": wall, "frames": int(videos.shape[0] * videos.shape[1])})
        if done:
            done()
    return timings


def summarize(timings: Sequence[Timing], fps: float) -> dict[str, list[float]]:
    """Per-request values by metric name, from timings with wall_s (or total_s), frames, first_frame_s,
    denoise_s.

    first_frame_s: request to first decoded frame. frames_per_s: all frames by the whole time, text encoding
    and decoding included. denoise_frames_per_s: by denoising alone. realtime_factor: seconds of video a
    second. other_share: part of the time in neither denoising nor decoding. A name is absent if its timing
    was not given.
    """
    out: dict[str, list[float]] = {}

    def put(name: str, values: list[float]) -> None:
        if values:
            out[name] = values

    rows = [{**t, "wall_s": t.get("wall_s", t.get("total_s"))} for t in timings]
    put("first_frame_s", [t["first_frame_s"] for t in rows if t.get("first_frame_s")])
    put("frames_per_s", [t["frames"] / t["wall_s"] for t in rows if t["wall_s"]])
    put("denoise_frames_per_s", [t["frames"] / t["denoise_s"] for t in rows if t.get("denoise_s")])
    put("realtime_factor", [t["frames"] / t["wall_s"] / fps for t in rows if t["wall_s"]])
    both = [t for t in rows if t["wall_s"] and "denoise_s" in t and "decode_s" in t]
    put("other_share", [1 - (t["denoise_s"] + t["decode_s"]) / t["wall_s"] for t in both])
    return out


def peak_memory_gib() -> dict[str, float]:
    """Peak resident memory of this process since it began, and of the CUDA allocator where one is in use."""
    import torch

    try:
        import resource
    except ImportError:  # Windows has no such counter
        peaks = {}
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = {"process_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peaks["cuda_reserved_peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return peaks


def _synchronize(reset_peak: bool = False) -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        if reset_peak:
            torch.cuda.reset_peak_memory_stats()
