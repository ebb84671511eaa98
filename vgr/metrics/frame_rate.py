"""Speed, latency and memory of generation (benchmarks spec, section 7).

Times are taken here, from a clock and from the frames that arrive, never from what a generator says of itself: all but
its stages, which only it knows (`Stages`), and what is left of a request beside them is told.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgr.metrics.statistics import Interval

Timing = dict[str, Any]
Watch = Callable[[NDArray[np.uint8]], None]
Request = Callable[[Watch], tuple[NDArray[np.uint8], Timing]]
# Dense bf16 operations a second by the device's name, the first that is part of it (benchmarks spec, 7.1).
PEAKS = {
    "B200": 2250e12, "H200 NVL": 835e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
}  # fmt: skip
STAGES = ("text", "encode", "denoise", "decode")
LEAST = {50: 1, 90: 10, 95: 100, 99: 100}  # percentile -> chunks it needs to be more than the slowest one


def known_peak(name: str) -> float | None:
    """Of a device, by PEAKS; None where it is not known, or only a part of one (MIG)."""
    return next((flops for part, flops in PEAKS.items() if part in name and "MIG" not in name), None)


class Stages:
    """Seconds by stage of one request: on a GPU between events in its stream, which hold nothing up, else by the clock.

    `mark` names what ran since the mark before; `seconds` waits for the device, once, and sums by name.
    """

    def __init__(self, device: str) -> None:
        self._cuda = _cuda() if device.startswith("cuda") else None
        self._marks: list[tuple[str, Any]] = []
        self.mark("")

    def mark(self, stage: str) -> None:
        event: Any = time.perf_counter()
        if self._cuda is not None:
            event = self._cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((stage, event))

    def seconds(self) -> dict[str, float]:
        """By stage, those that ran."""
        if self._cuda is not None:
            self._cuda.synchronize()
        found: dict[str, float] = {}
        for (_, a), (stage, b) in zip(self._marks, self._marks[1:]):
            found[stage] = found.get(stage, 0.0) + (b - a if self._cuda is None else a.elapsed_time(b) / 1000)
        return found


def measure_requests(
    requests: Sequence[Request], warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[Timing]:
    """Run every request, one after another, and return one timing each, after `warmup` untimed calls of the first.

    A request takes watch(frames (B,f,H,W,3)), to be called with frames on the host as they are decoded, and returns all
    of them (B,F,H,W,3) with its own timings. A timing: wall_s, frames (of all videos), videos, arrivals [[seconds,
    frames]] of each video's pieces, held_bytes then, memory_bytes at the end, the generator's stages (<stage>_s), and
    the operations of its first warm-up as torch counts them (products, convolutions, attention; kernels of Triton are
    not seen) with the device's peak.
    """
    timings: list[Timing] = []
    counted = _operations(requests[0]) if warmup and requests else {}
    for request in (*requests[:1] * (warmup - 1), *requests):
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()
        pieces: list[tuple[float, int, int]] = []

        def watch(frames: NDArray[np.uint8], pieces: list[Any] = pieces) -> None:
            memory = memory_bytes()
            pieces.append((clock(), frames.shape[1], memory.get("held", memory["host"])))

        start = clock()
        videos, own = request(watch)
        wall = clock() - start  # decoded videos are on the host: the device has finished
        timings.append({"wall_s": wall, "frames": int(videos.shape[0] * videos.shape[1]), "videos": len(videos),
                        "arrivals": [[at - start, count] for at, count, _ in pieces], "memory_bytes": memory_bytes(),
                        "held_bytes": [held for *_, held in pieces], **counted,
                        **{f"{x}_s": own[f"{x}_s"] for x in STAGES if f"{x}_s" in own}})  # fmt: skip
    return timings[max(0, warmup - 1) :]


def _operations(request: Request) -> Timing:
    """flops of a request, where torch counts any, and peak_flops of the device, where it is known."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        request(lambda frames: None)
    name = cuda.get_device_name() if (cuda := _cuda()) is not None else ""
    told = {"flops": counter.get_total_flops(), "peak_flops": known_peak(name)}
    return {k: v for k, v in told.items() if v}


def memory_bytes() -> dict[str, int]:
    """Memory by who counts it: the process's peak on the `host`; of a GPU tensors `held` now, peaks `allocated` and
    `reserved` (torch's pool), and what the driver gives away on the whole `device` (other processes too)."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if (cuda := _cuda()) is not None:
        free, total = cuda.mem_get_info()
        found |= {"held": cuda.memory_allocated(), "allocated": cuda.max_memory_allocated(),
                  "reserved": cuda.max_memory_reserved(), "device": total - free}  # fmt: skip
    return found


def _cuda() -> Any:
    """torch.cuda where torch is in use and sees a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def summarize(timings: Sequence[Timing], fps: float) -> dict[str, list[float]]:
    """Per-request values by metric name, from timings as far as they go; those of older sets have first_frame_s.

    first_frame_s: request (text not yet encoded) to the first frames on the host. frames_per_s: all frames by the whole
    time; steady_: those after the second piece by their time; denoise_: by denoising alone. realtime_factor: seconds of
    one video by the whole time. late_share: pieces that arrive after a player that began with the first would show
    them. stage_<stage>_s: seconds of it, stage_other_s what no stage has. tflops_per_s: operations by the whole time,
    mfu: of the device's peak. latency_s_per_min, memory_gb_per_min: Theil-Sen slopes over the rollout of the time a
    piece takes and of what is held. control_latency_s as given. memory_*_gb as `memory_bytes`.
    """
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        if np.isfinite(value):
            found.setdefault(name, []).append(float(value))

    for t in timings:
        pieces = np.array(t.get("arrivals") or np.zeros((0, 2)), dtype=np.float64)
        add("first_frame_s", pieces[0, 0] if len(pieces) else t.get("first_frame_s") or np.nan)
        if t.get("wall_s"):
            add("frames_per_s", t["frames"] / t["wall_s"])
            add("realtime_factor", t["frames"] / t.get("videos", 1) / fps / t["wall_s"])
        add("denoise_frames_per_s", t["frames"] / t["denoise_s"] if t.get("denoise_s") else np.nan)
        stages = {x: t[f"{x}_s"] for x in STAGES if t.get(f"{x}_s") is not None}
        for stage, seconds in stages.items() if t.get("wall_s") and len(stages) > 1 else ():
            add(f"stage_{stage}_s", seconds)
        add("stage_other_s", t["wall_s"] - sum(stages.values()) if t.get("wall_s") and len(stages) > 1 else np.nan)
        if t.get("wall_s") and t.get("flops"):
            add("tflops_per_s", t["flops"] / t["wall_s"] / 1e12)
            add("mfu", t["flops"] / t["wall_s"] / t["peak_flops"] if t.get("peak_flops") else np.nan)
        add("control_latency_s", t.get("control_latency_s") or np.nan)
        if len(pieces) > 2:
            times, counts = pieces.T
            add("steady_frames_per_s", counts[2:].sum() * t.get("videos", 1) / max(times[-1] - times[1], 1e-12))
            shown = times[0] + np.cumsum(counts)[:-1] / fps
            add("late_share", (times[1:] > shown + 1e-9).mean())
        if len(pieces) > 4:
            add("latency_s_per_min", _slope(times[2:] / 60, np.diff(times)[1:]))
            add("memory_gb_per_min", _slope(times / 60, np.array(t["held_bytes"]) / 1e9))
        for name in t.get("memory_bytes", {}).keys() - {"held"}:
            add(f"memory_{name}_gb", t["memory_bytes"][name] / 1e9)
    return found


def chunk_latencies(timings: Sequence[Timing]) -> NDArray[np.float64]:
    """Seconds from one piece's arrival to the next's, of all requests, from the second on: a first frame may be handed
    over before the rest of its chunk."""
    return np.concatenate([np.diff([a for a, _ in t.get("arrivals", ())])[1:] for t in timings] or [np.zeros(0)])


def percentile_intervals(latencies_N: Sequence[float], draws: int = 2000) -> dict[str, Interval]:
    """Percentiles of latencies in seconds with bootstrap intervals, those that so many samples can carry."""
    values = np.asarray(latencies_N, dtype=np.float64)
    rng, found = np.random.default_rng(0), {}
    for p in (p for p, least in LEAST.items() if len(values) >= least):
        drawn = np.percentile(values[rng.integers(len(values), size=(draws, len(values)))], p, axis=1)
        low, high = np.percentile(drawn, [2.5, 97.5])
        found[f"chunk_p{p}_s"] = Interval(float(np.percentile(values, p)), float(low), float(high), len(values))
    return found


def control_latency(
    arrivals: Sequence[Sequence[float]], changed_s: float, steered: NDArray[np.uint8], straight: NDArray[np.uint8],
    least: float = 1.0,
) -> float:  # fmt: skip
    """Seconds from a changed control (at changed_s) to the arrival of the first frame that shows it; inf: none does.

    steered, straight (F,H,W,3): the rollout with the change and the same one (same noise) without it; a frame shows it
    where they differ by `least` grey levels on average. arrivals as in `measure_requests`.
    """
    change = np.abs(steered.astype(np.int16) - straight.astype(np.int16)).mean((1, 2, 3))
    if not (change >= least).any():
        return float("inf")
    frame, ends = int((change >= least).argmax()), np.cumsum([count for _, count in arrivals])
    return float(arrivals[int(np.searchsorted(ends, frame, side="right"))][0] - changed_s)


def _slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    from scipy import stats

    return float(stats.theilslopes(y, x)[0])
