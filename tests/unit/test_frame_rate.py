"""A generator of known latency on a clock that only it moves: every figure is exact."""

import numpy as np
import pytest

from vgr.metrics import frame_rate
from vgr.metrics.frame_rate import (
    Stages,
    chunk_latencies,
    control_latency,
    measure_requests,
    percentile_intervals,
    summarize,
)

FPS = 10.0


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Fake:
    """Text 0.3 s, then chunks of 4 frames: each so long to denoise and 0.1 s to decode; the first calls compile."""

    def __init__(self, clock, denoise=(0.5,) * 6, slow_calls=0, claimed=24, videos=1):
        self.clock, self.denoise, self.claimed, self.videos = clock, denoise, claimed, videos
        self.slow_calls, self.calls = slow_calls, 0

    def __call__(self, watch):
        self.calls += 1
        self.clock.now += 0.3 + (60.0 if self.calls <= self.slow_calls else 0.0)
        pieces = []
        for seconds in self.denoise:
            self.clock.now += seconds + 0.1
            pieces.append(np.zeros((self.videos, 4, 4, 4, 3), np.uint8))
            watch(pieces[-1])
        own = {"denoise_s": sum(self.denoise), "first_frame_s": 1e-9, "frames": self.claimed}
        return np.concatenate(pieces, axis=1), own


def test_known_latencies_are_reported_and_warm_up_left_out():
    clock = Clock()
    fake = Fake(clock, slow_calls=2, claimed=1000)  # it lies about frames and about its first one
    timings = measure_requests([fake] * 3, warmup=2, clock=clock)
    assert fake.calls == 5 and [t["frames"] for t in timings] == [24] * 3
    got = summarize(timings, FPS)
    want = {
        "first_frame_s": 0.3 + 0.6, "frames_per_s": 24 / 3.9, "steady_frames_per_s": 20 / 3.0,
        "denoise_frames_per_s": 24 / 3.0, "realtime_factor": 2.4 / 3.9, "latency_s_per_min": 0.0,
        # Shown from 0.9 s on, a chunk every 0.4 s, made in 0.6: all five later ones are late.
        "late_share": 1.0,
    }  # fmt: skip
    for name, value in want.items():
        assert got[name] == pytest.approx([value] * 3, abs=1e-9), name
    memory = {f"memory_{x}_gb" for x in ("host", "device", "allocated", "reserved")}
    assert set(got) - set(want) <= {"memory_gb_per_min", *memory}
    assert all(x > 0.01 for x in got["memory_host_gb"])
    assert chunk_latencies(timings) == pytest.approx([0.6] * 12)


def test_faster_than_playback_is_never_late_and_a_batch_counts_all_its_videos():
    clock = Clock()
    got = summarize(measure_requests([Fake(clock, denoise=(0.1,) * 6, videos=3)], 0, clock), FPS)
    assert got["late_share"] == [0.0] and got["frames_per_s"] == pytest.approx([72 / 1.5])
    assert got["realtime_factor"] == pytest.approx([2.4 / 1.5])
    assert got["steady_frames_per_s"] == pytest.approx([48 / 0.8])


def test_a_first_frame_handed_over_early_is_no_chunk_and_a_video_made_at_once_has_no_steady_rate():
    clock, ends = Clock(), (1.0, 1.1, 1.6, 2.1)

    def request(watch, counts=(1, 3, 4, 4)):
        start = clock.now
        for end, count in zip(ends, counts):
            clock.now = start + end
            watch(np.zeros((1, count, 4, 4, 3), np.uint8))
        return np.zeros((1, sum(counts), 4, 4, 3), np.uint8), {}

    timings = measure_requests([request], 0, clock)
    got = summarize(timings, FPS)
    assert got["first_frame_s"] == pytest.approx([1.0]) and chunk_latencies(timings) == pytest.approx([0.5, 0.5])
    assert got["steady_frames_per_s"] == pytest.approx([8 / 1.0])
    at_once = measure_requests([lambda watch: request(watch, (1, 11))], 0, clock)
    assert "steady_frames_per_s" not in summarize(at_once, FPS) and chunk_latencies(at_once).size == 0


def test_a_rollout_that_slows_down_has_the_slope_it_was_given():
    clock = Clock()
    denoise, total = [], 0.0
    for _ in range(20):  # a chunk takes 0.4 s and 0.2 s more for every minute already made
        seconds = (0.4 + 0.2 * total / 60) / (1 - 0.2 / 60)
        denoise.append(seconds)
        total += seconds + 0.1
    got = summarize(measure_requests([Fake(clock, denoise=tuple(denoise))], 0, clock), FPS)
    assert got["latency_s_per_min"] == pytest.approx([0.2], rel=0.02)


def test_percentiles_wait_for_enough_chunks():
    rng = np.random.default_rng(0)
    latencies = rng.gamma(4, 0.1, 400)
    got = percentile_intervals(latencies)
    assert list(got) == ["chunk_p50_s", "chunk_p90_s", "chunk_p95_s", "chunk_p99_s"]
    for p in (50, 90, 95, 99):
        found = got[f"chunk_p{p}_s"]
        assert found.value == np.percentile(latencies, p) and found.low <= found.value <= found.high
        assert found.count == 400
    values = [x.value for x in got.values()]
    assert values == sorted(values)
    assert list(percentile_intervals(latencies[:99])) == ["chunk_p50_s", "chunk_p90_s"]
    assert list(percentile_intervals(latencies[:9])) == ["chunk_p50_s"] and percentile_intervals([]) == {}


def test_control_latency_runs_from_the_change_to_the_first_frame_that_shows_it():
    straight = np.zeros((12, 4, 4, 3), np.uint8)
    steered = straight.copy()
    steered[6:] = 50  # in the second chunk of four
    arrivals = [[1.0, 4], [1.6, 4], [2.2, 4]]
    assert control_latency(arrivals, 0.9, steered, straight) == pytest.approx(0.7)
    steered[3, 0, 0, 0] = 2  # less than a grey level on average: noise, not the change
    assert control_latency(arrivals, 0.9, steered, straight) == pytest.approx(0.7)
    steered[8:], steered[6:8] = 50, 0
    assert control_latency(arrivals, 0.9, steered, straight) == pytest.approx(1.3)
    assert control_latency(arrivals, 0.9, straight, straight) == float("inf")


def test_absent_timings_give_absent_metrics_and_older_sets_keep_theirs():
    got = summarize([{"wall_s": 2.0, "frames": 10, "first_frame_s": 0.5}], FPS)
    assert got == {"first_frame_s": [0.5], "frames_per_s": [5.0], "realtime_factor": [0.5]}
    assert summarize([], FPS) == {} and chunk_latencies([]).size == 0


def test_stages_are_summed_by_name_and_what_none_has_is_other(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(frame_rate.time, "perf_counter", clock)

    def request(watch):
        stages = Stages("cpu")
        for stage, seconds in (("text", 0.3), ("denoise", 0.5), ("decode", 0.1), ("denoise", 0.25), ("decode", 0.05)):
            clock.now += seconds
            stages.mark(stage)
        watch(frames := np.zeros((1, 8, 4, 4, 3), np.uint8))
        clock.now += 0.2  # the way out
        return frames, {f"{k}_s": v for k, v in stages.seconds().items()}

    got = summarize(measure_requests([request], 0, clock), FPS)
    want = {"text": 0.3, "denoise": 0.75, "decode": 0.15, "other": 0.2}
    assert {k: v for k, v in got.items() if k.startswith("stage_")} == {
        f"stage_{k}_s": pytest.approx([v]) for k, v in want.items()
    }
    assert got["denoise_frames_per_s"] == pytest.approx([8 / 0.75])


def test_operations_are_counted_once_in_the_warm_up_and_utilisation_wants_a_known_device(monkeypatch):
    import torch

    clock, seen = Clock(), []

    def request(watch):
        seen.append(torch.ones(16, 32) @ torch.ones(32, 8))
        clock.now += 0.5
        watch(frames := np.zeros((1, 4, 4, 4, 3), np.uint8))
        return frames, {}

    timings = measure_requests([request] * 2, 1, clock)
    assert len(seen) == 3 and [t["flops"] for t in timings] == [2 * 16 * 32 * 8] * 2
    got = summarize(timings, FPS)
    assert got["tflops_per_s"] == pytest.approx([2 * 16 * 32 * 8 / 0.5 / 1e12] * 2) and "mfu" not in got
    assert "flops" not in measure_requests([request], 0, clock)[0]
    got = summarize([t | {"peak_flops": 1e9} for t in timings], FPS)
    assert got["mfu"] == pytest.approx([2 * 16 * 32 * 8 / 0.5 / 1e9] * 2)
    found = {name: next(x for part, x in frame_rate.PEAKS.items() if part in name)
             for name in ("NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3")}  # fmt: skip
    assert list(found.values()) == [989e12, 756e12, 989e12]
