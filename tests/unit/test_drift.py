import cv2
import numpy as np
import pytest

from vgr.metrics.drift import UNITS, composite, measure_drift

FPS = 10.0


def lab_video(lightness_F, seed=0, size=(48, 64)):
    """Smooth texture whose mean CIE L* follows lightness_F, as uint8."""
    rng = np.random.default_rng(seed)
    texture = cv2.GaussianBlur(rng.normal(size=(*size, 3)).astype(np.float32), (0, 0), 3)
    texture = texture / np.abs(texture).max() * np.float32([12, 8, 8])
    texture -= texture.mean((0, 1))
    frames = []
    for light in lightness_F:
        lab = texture + np.float32([light, 5, 5])
        frames.append(np.rint(cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB) * 255))
    return np.stack(frames).clip(0, 255).astype(np.uint8)


def test_constant_video_has_no_trend():
    drift = measure_drift(np.repeat(lab_video([50.0]), 60, axis=0), FPS)
    assert set(drift.slope) == set(UNITS)
    assert max(abs(v) for v in drift.slope.values()) < 1e-9
    assert drift.level["motion"] == 0
    blank = measure_drift(np.full((60, 48, 64, 3), 90, np.uint8), FPS)
    assert max(abs(v) for v in blank.slope.values()) < 1e-9


@pytest.mark.parametrize("fps", [8.0, 10.0, 24.0])
def test_gain_ramp_is_recovered_within_two_percent_at_any_frame_rate(fps):
    times = np.arange(round(8 * fps)) / fps
    drift = measure_drift(lab_video(40 + 1.0 * times), fps)
    assert drift.slope["lightness"] == pytest.approx(1.0, rel=0.02)
    assert drift.curve["lightness"] == pytest.approx(40 + drift.times_J, abs=0.5)
    assert abs(drift.slope["chroma"]) < 0.05 and abs(drift.slope["contrast"]) < 0.05


def test_a_ramp_shows_under_a_moving_scene_and_other_clips_noise():
    times = np.arange(80) / FPS
    rng = np.random.default_rng(1)
    real = [lab_video(50 + rng.normal(0, 0.3, 80).cumsum() * 0.2, seed=s) for s in range(6)]
    gain = [np.clip(v.astype(float) * (1 + 0.02 * times)[:, None, None, None], 0, 255).astype(np.uint8) for v in real]
    base = np.array([measure_drift(v, FPS).slope["lightness"] for v in real])
    more = np.array([measure_drift(v, FPS).slope["lightness"] for v in gain])
    assert ((more - base) > 0.5).all()


def test_blur_ramp_lowers_sharpness():
    rng = np.random.default_rng(2)
    sharp = rng.integers(0, 255, (48, 64, 3)).astype(np.uint8)
    blurred = np.stack([cv2.GaussianBlur(sharp, (0, 0), 0.3 + 0.02 * i) for i in range(60)])
    assert measure_drift(blurred, FPS).slope["sharpness"] < -0.1


@pytest.mark.parametrize("frames", [60, 64, 97])
def test_time_reversal_flips_every_trend(frames):
    video = lab_video(45 + np.cumsum(np.random.default_rng(3).normal(0.2, 0.5, frames)))
    there, back = measure_drift(video, FPS), measure_drift(video[::-1], FPS)
    for name in set(UNITS) - {"motion"}:  # flow is not symmetric
        assert there.slope[name] == pytest.approx(-back.slope[name], abs=1e-9), name


def test_motion_is_in_diagonals_a_second():
    rng = np.random.default_rng(4)
    image = cv2.GaussianBlur(rng.uniform(0, 255, (60, 200, 3)).astype(np.float32), (0, 0), 2)
    image = ((image - image.mean()) * 4 + 128).clip(0, 255).astype(np.uint8)
    video = np.stack([image[:, 2 * f : 2 * f + 80] for f in range(40)])
    assert measure_drift(video, FPS).level["motion"] == pytest.approx(2 * FPS / 100, rel=0.1)


def test_composite_is_zero_without_excess_and_grows_with_it():
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(32, len(UNITS)))
    sd = np.ones(len(UNITS))
    assert composite(np.zeros_like(noise), sd)[:3] == (0, 0, 0)
    small, large = composite(noise, sd), composite(noise + 2, sd)
    assert small.value < 0.4 and large.value == pytest.approx(2, abs=0.3)
    assert large.low < large.value < large.high and large.low > small.high


def test_too_short_is_refused_with_the_setting():
    with pytest.raises(ValueError, match=r"window_s"):
        measure_drift(np.zeros((20, 48, 64, 3), np.uint8), FPS)
