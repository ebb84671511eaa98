import time

import numpy as np
import pytest

from vgr.metrics.frame_rate import measure_requests, summarize

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
    timings = measure_requests([generator] * 3, warmup=2)
    assert generator.calls == 5 and len(timings) == 3
    values = summarize(timings)
    for t in timings:
        assert 0.08 <= t["wall_s"] < 0.45
    assert all(FRAMES / 0.45 < v <= FRAMES / 0.08 for v in values["frames_per_s"])
    assert values["denoise_frames_per_s"] == pytest.approx([FRAMES / 0.06] * 3)
    assert values["first_frame_s"] == [0.08] * 3


def test_frames_are_counted_from_the_video():
    timings = measure_requests([Sleeper(claimed_frames=1000)], warmup=0)
    assert timings[0]["frames"] == FRAMES


def test_absent_timings_give_absent_metrics():
    assert summarize([{"wall_s": 2.0, "frames": 10}]) == {"frames_per_s": [5.0]}
    assert summarize([]) == {}
