import cv2
import numpy as np
import pytest
from scipy import stats

from vgr.metrics.drift import (
    PRIMARY,
    UNITS,
    Drift,
    composite,
    folded_floor,
    frame_statistics,
    measure_drift,
    seam_ratio,
    stagnation,
    time_to_failure,
)
from vgr.metrics.image import ssim
from vgr.metrics.statistics import mean_interval

FPS = 10.0
SYMMETRIC = set(UNITS) - {"motion", "structure"}  # flow has a direction, structure an anchor: the first frame


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


def scene(frames, seed=0, speed=1.5):
    """A camera that pans over a wall, with a light that wanders a little: a real video's part."""
    rng = np.random.default_rng(seed)
    wide = cv2.GaussianBlur(rng.uniform(0, 255, (48, 400, 3)).astype(np.float32), (0, 0), 2)
    wide = (wide - wide.mean()) * 4 + 120
    light = np.cumsum(rng.normal(0, 0.4, frames))
    moves = [np.float32([[1, 0, -20 - speed * f], [0, 1, 0]]) for f in range(frames)]
    frames = [(cv2.warpAffine(wide, m, (400, 48))[:, :64] + x).clip(0, 255) for m, x in zip(moves, light)]
    return np.stack(frames).astype(np.uint8)


def test_constant_video_has_no_trend():
    for video in (np.repeat(lab_video([50.0]), 60, axis=0), np.full((60, 48, 64, 3), 90, np.uint8)):
        drift = measure_drift(video, FPS)
        assert set(drift.slope) == set(UNITS)
        assert max(abs(v) for v in (*drift.slope.values(), *drift.start_end.values())) < 1e-9
        assert drift.level["motion"] == 0 and drift.level["steadiness"] == drift.level["structure"] == 1
        assert (drift.steps == 0).all()


@pytest.mark.parametrize("fps", [8.0, 10.0, 24.0])
def test_gain_ramp_is_recovered_within_two_percent_at_any_frame_rate(fps):
    times = np.arange(round(8 * fps)) / fps
    drift = measure_drift(lab_video(40 + 1.0 * times), fps)
    assert drift.slope["lightness"] == pytest.approx(1.0, rel=0.02)
    assert drift.curve["lightness"] == pytest.approx(40 + drift.times_J, abs=0.5)
    assert drift.start_end["lightness"] == pytest.approx(0.85 * 8, rel=0.03)
    assert all(abs(drift.slope[name]) < 0.05 for name in ("chroma", "contrast", "red_green", "yellow_blue"))


def test_the_slope_is_theil_and_sens():
    rng = np.random.default_rng(11)
    drift = measure_drift(lab_video(50 + rng.normal(0, 3, 90).cumsum() * 0.3), FPS)
    for name in UNITS:
        assert drift.slope[name] == pytest.approx(stats.theilslopes(drift.curve[name], drift.times_J)[0], abs=1e-12)


def test_every_statistic_answers_to_its_own_injury():
    """Slopes of a video injured more and more, by what; signs and the size where it is known."""
    base, t = scene(40), np.linspace(0, 1, 40)
    sharp = np.repeat(np.random.default_rng(8).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8), 40, 0)
    rng = np.random.default_rng(1)
    noisy = np.stack([f + rng.normal(0, 0.01 + 10 * x, f.shape) for f, x in zip(base, t)]).clip(0, 255)
    blurred = np.stack([cv2.GaussianBlur(f, (0, 0), 0.3 + x) for f, x in zip(sharp, t)])
    red = base + 40 * t[:, None, None, None] * np.array([1, 0, 0])
    bright = base + 160 * t[:, None, None, None]
    slow = np.concatenate([base[:20], np.repeat(base[19:20], 20, 0)])
    flat = 120 + (base - 120.0) * (1 - 0.8 * t)[:, None, None, None]
    for video, name, sign in ((noisy, "noise", 1), (noisy, "detail", 1), (noisy, "steadiness", -1),
                              (blurred, "detail", -1), (blurred, "sharpness", -1), (red, "red_green", 1),
                              (bright, "clipped", 1),
                              (bright, "lightness", 1), (slow, "motion", -1), (flat, "contrast", -1),
                              (flat, "chroma", -1)):  # fmt: skip
        slopes = [measure_drift(x.clip(0, 255).astype(np.uint8), FPS).slope[name] for x in (video, base)]
        assert sign * (slopes[0] - slopes[1]) > 0.05 * abs(slopes[1]) + 1e-4, name


def test_noise_is_in_grey_levels():
    rng = np.random.default_rng(2)
    for sd in (3.0, 8.0):
        grey = (120 + rng.normal(0, sd, (3, 200, 300, 1))).round().clip(0, 255).astype(np.uint8)
        values = frame_statistics(grey.repeat(3, -1), FPS)[0]["noise"][1]
        assert values == pytest.approx(np.full(3, sd), rel=0.03)


def test_structure_is_ssim_with_the_shots_first_frame_and_larger_pictures_are_reduced():
    video = scene(12)
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in video])[..., None]
    series, steps = frame_statistics(video, FPS, cuts=[5])
    want = [*ssim(grey[:5], grey[:1].repeat(5, 0)), *ssim(grey[5:], grey[5:6].repeat(7, 0))]
    assert series["structure"][1] == pytest.approx(want) and want[5] == 1
    assert np.isnan(steps[4]) and np.isfinite(np.delete(steps, 4)).all()  # the step over the cut is none
    assert len(series["motion"][1]) == len(series["steadiness"][1]) == 10
    large = np.stack([cv2.resize(f, (1024, 768), interpolation=cv2.INTER_CUBIC) for f in video[:2]])
    half = np.stack([cv2.resize(f, (512, 384), interpolation=cv2.INTER_AREA) for f in large])
    for name in set(UNITS) - {"clipped", "noise", "steadiness"}:
        assert frame_statistics(large, FPS)[0][name][1] == pytest.approx(frame_statistics(half, FPS)[0][name][1])


def test_frames_come_one_by_one():
    """A generator that gives each frame once, with nothing held but the one before and the shot's first."""
    video = scene(64)

    def stream():
        yield from video

    one, all_at_once = measure_drift(stream(), FPS, 1.0, [30]), measure_drift(video, FPS, 1.0, [30])
    assert one.slope == all_at_once.slope and one.start_end == all_at_once.start_end


def test_a_ramp_shows_under_a_moving_scene_and_other_clips_noise():
    times = np.arange(80) / FPS
    rng = np.random.default_rng(1)
    real = [lab_video(50 + rng.normal(0, 0.3, 80).cumsum() * 0.2, seed=s) for s in range(4)]
    gain = [np.clip(v.astype(float) * (1 + 0.02 * times)[:, None, None, None], 0, 255).astype(np.uint8) for v in real]
    base = np.array([measure_drift(v, FPS).slope["lightness"] for v in real])
    more = np.array([measure_drift(v, FPS).slope["lightness"] for v in gain])
    assert ((more - base) > 0.5).all()


def test_the_interval_of_real_videos_contains_zero_and_that_of_shuffled_windows():
    real = [scene(40, seed) for seed in range(20, 32)]
    drifts = [measure_drift(v, FPS) for v in real]
    for name in ("lightness", "contrast", "sharpness", "noise"):
        interval = mean_interval([d.slope[name] for d in drifts])
        assert interval.low < 0 < interval.high, name
    rng, slopes = np.random.default_rng(3), []
    for seed in range(12):
        video = lab_video(40 + 2.0 * np.arange(60) / FPS, seed)
        order = np.concatenate([np.arange(10) + 10 * w for w in rng.permutation(6)])
        slopes.append(measure_drift(video[order], FPS).slope["lightness"])
    interval = mean_interval(slopes)
    assert interval.low < 0 < interval.high and measure_drift(lab_video(40 + 0.2 * np.arange(60)), FPS).slope[
        "lightness"] == pytest.approx(2.0, rel=0.02)  # fmt: skip


@pytest.mark.parametrize("frames", [60, 64, 97])
def test_time_reversal_flips_every_trend_and_end_difference(frames):
    video = lab_video(45 + np.cumsum(np.random.default_rng(3).normal(0.2, 0.5, frames)))
    there, back = measure_drift(video, FPS), measure_drift(video[::-1], FPS)
    for name in SYMMETRIC:
        assert there.slope[name] == pytest.approx(-back.slope[name], abs=1e-9), name
        assert there.start_end[name] == pytest.approx(-back.start_end[name], abs=1e-9), name


def test_motion_is_in_diagonals_a_second():
    rng = np.random.default_rng(4)
    image = cv2.GaussianBlur(rng.uniform(0, 255, (60, 200, 3)).astype(np.float32), (0, 0), 2)
    image = ((image - image.mean()) * 4 + 128).clip(0, 255).astype(np.uint8)
    video = np.stack([image[:, 2 * f : 2 * f + 80] for f in range(40)])
    assert measure_drift(video, FPS).level["motion"] == pytest.approx(2 * FPS / 100, rel=0.1)


def test_trends_are_of_shots_not_across_cuts():
    """Two shots with equal ramps, the second much darker: across the cut the trend would be downwards."""
    shots = [lab_video(60 + 1.0 * np.arange(40) / FPS), lab_video(30 + 1.0 * np.arange(50) / FPS, seed=1)]
    video = np.concatenate(shots)
    split, across = measure_drift(video, FPS, 1.0, [40]), measure_drift(video, FPS)
    assert split.slope["lightness"] == pytest.approx(1.0, rel=0.05) and across.slope["lightness"] < -2
    assert split.start_end["lightness"] == pytest.approx(0.85 * (4 * 4 + 5 * 5) / 9, rel=0.05)
    assert len(split.times_J) == 9 and np.isnan(split.steps[39])


def test_a_rollout_that_freezes_stagnates():
    frozen = np.concatenate([scene(20), np.repeat(scene(20)[-1:], 40, 0)])
    assert stagnation(measure_drift(frozen, FPS).curve["motion"]) == pytest.approx(4 / 5)
    assert stagnation(measure_drift(scene(60), FPS).curve["motion"]) == 0
    assert stagnation(np.zeros(6)) == 1


def test_seams_between_chunks():
    rng = np.random.default_rng(6)
    steps = rng.uniform(1, 2, 48)
    starts = [9, 21, 33, 45]
    assert seam_ratio(steps, starts) == pytest.approx(1.0, abs=0.2)
    steps[[s - 1 for s in starts]] *= 3
    rest = np.delete(steps, [s - 1 for s in starts])
    want = np.sqrt((steps[[8, 20, 32, 44]] ** 2).mean() / (rest**2).mean())
    assert seam_ratio(steps, starts) == pytest.approx(want) and want > 2.5
    video = scene(49, speed=0.3)
    for start in starts:
        video[start:] = (video[start:].astype(int) + 12).clip(0, 255)  # the light jumps as a chunk begins
    assert seam_ratio(measure_drift(video, FPS).steps, starts) > 1.3
    assert np.isnan(seam_ratio(steps, [])) and np.isnan(seam_ratio(np.zeros(5), [2]))


def test_the_floor_of_end_differences_is_that_of_a_folded_normal():
    differences = np.random.default_rng(7).normal(0, 2.5, 20000)
    assert folded_floor(differences) == pytest.approx(np.abs(differences).mean(), rel=0.02)
    assert np.isnan(folded_floor([1.0]))


def curves(**named):
    windows = len(next(iter(named.values())))
    return Drift({}, {}, {}, np.arange(windows) + 0.5, {k: np.array(v, float) for k, v in named.items()}, np.zeros(1))


def test_time_to_failure_needs_two_windows_outside():
    bands = {"lightness": (40, 60), "motion": (0.1, 1)}
    steady = [0.5] * 6
    assert time_to_failure(curves(lightness=[50] * 6, motion=steady), bands) == (5.5, False)
    assert time_to_failure(curves(lightness=[50, 70, 50, 70, 70, 70], motion=steady), bands) == (3.5, True)
    both = curves(lightness=[50] * 4 + [30, 30], motion=[0.5, 0, 0, 0.5, 0.5, 0.5])
    assert time_to_failure(both, bands) == (1.5, True)
    assert time_to_failure(curves(lightness=[50] * 5 + [70], motion=steady), bands) == (5.5, False)


def test_composite_is_zero_without_excess_and_grows_with_it():
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(32, len(PRIMARY)))
    sd = np.ones(len(PRIMARY))
    assert composite(np.zeros_like(noise), sd)[:3] == (0, 0, 0)
    small, large = composite(noise, sd), composite(noise + 2, sd)
    assert small.value < 0.4 and large.value == pytest.approx(2, abs=0.3)
    assert large.low < large.value < large.high and large.low > small.high


def test_too_short_is_refused_with_the_setting():
    with pytest.raises(ValueError, match=r"window_s"):
        measure_drift(np.zeros((20, 48, 64, 3), np.uint8), FPS)
    with pytest.raises(ValueError, match=r"no shot of 60 frames at 10 a second with 2 cuts"):
        measure_drift(np.zeros((60, 48, 64, 3), np.uint8), FPS, 1.0, [20, 40])
