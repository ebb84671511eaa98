import time

import numpy as np
import pytest

from vgr.metrics.frame_rate import measure_requests, peak_memory_gib, summarize

FRAMES = 8


class Sleeper:
    """A generator of known latency whose first calls are slow, as compilation is."""

    def __init__(self, slow_calls=0, claimed_frames=FRAMES):
        self.calls, self.slow_calls, self.claimed_frames = 0, slow_calls, claimed_frames

    def __call__(self):
        self.calls += 1
        time.sleep(0.5 if self.calls <= self.slow_calls else 0)
        time.sleep(0.06)
        time.sleep(0.02)
        own = {"first_frame_s": 0.08, "denoise_s": 0.06, "decode_s": 0.02, "frames": self.claimed_frames}
        return np.zeros((1, FRAMES, 4, 4, 3), np.uint8), own


def test_known_latency_is_reported_and_warm_up_left_out():
    generator = Sleeper(slow_calls=2)
    ticks = []
    timings = measure_requests([generator] * 3, warmup=2, done=lambda: ticks.append(1))
    assert generator.calls == 5 and len(timings) == 3 and len(ticks) == 3
    values = summarize(timings, fps=4.0)
    for t in timings:
        assert 0.08 <= t["wall_s"] < 0.45
    assert all(FRAMES / 0.45 < v <= FRAMES / 0.08 for v in values["frames_per_s"])
    assert values["denoise_frames_per_s"] == pytest.approx([FRAMES / 0.06] * 3)
    assert values["realtime_factor"] == pytest.approx([v / 4 for v in values["frames_per_s"]])
    assert all(0 <= v < 0.85 for v in values["other_share"])


def test_frames_are_counted_from_the_video():
    timings = measure_requests([Sleeper(claimed_frames=1000)], warmup=0)
    assert timings[0]["frames"] == FRAMES


def test_stages_longer_than_the_whole_are_refused():
    def liar():
        return np.zeros((1, 2, 4, 4, 3), np.uint8), {"denoise_s": 9.0, "decode_s": 1.0}

    with pytest.raises(ValueError, match="10.000 s in stages"):
        measure_requests([liar], warmup=0)


def test_absent_timings_give_absent_metrics():
    assert set(summarize([{"total_s": 2.0, "frames": 10}], fps=5.0)) == {"frames_per_s", "realtime_factor"}
    assert summarize([{"total_s": 2.0, "frames": 10}], fps=5.0)["realtime_factor"] == [1.0]
    assert summarize([], fps=5.0) == {}


def test_peak_memory_grows_by_an_allocation():
    before = peak_memory_gib()["process_peak_gib"]
    block = np.ones(int((before + 0.25) * 2**30), np.uint8)  # above the peak so far, whatever ran before
    after = peak_memory_gib()["process_peak_gib"]
    assert after - before > 0.2 and block[-1] == 1
