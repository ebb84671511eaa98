"""VBench's reducers against its formulas written out, one term after another."""

import numpy as np
import pytest

from vgr.metrics import vbench

RNG = np.random.default_rng(0)


def literal_consistency(features):
    """As the published script goes: a running sum over the frames after the first."""
    total = 0.0
    unit = [x / np.linalg.norm(x) for x in features]
    for before, x in zip(unit, unit[1:]):
        total += (max(0.0, float(x @ before)) + max(0.0, float(x @ unit[0]))) / 2
    return total / (len(features) - 1)


def test_consistency_is_the_published_sum():
    features = RNG.normal(size=(9, 5))  # random: many cosines are negative, and count as none
    assert vbench.consistency(features) == pytest.approx(literal_consistency(features), abs=1e-12)
    assert vbench.consistency(np.tile(features[:1], (4, 1)) * [[1], [2], [3], [4]]) == pytest.approx(1)
    assert np.isnan(vbench.consistency(features[:1]))


def test_flicker_and_smoothness_are_mean_absolute_differences():
    frames = RNG.integers(0, 256, (7, 6, 8, 3), dtype=np.uint8)
    steps = [abs(frames[i].astype(int) - frames[i + 1]).mean() for i in range(6)]
    assert vbench.flickering(frames) == pytest.approx((255 - np.mean(steps)) / 255, abs=1e-12)
    made = RNG.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    off = [abs(frames[i].astype(int) - made[i // 2]).mean() for i in (1, 3, 5)]
    assert vbench.smoothness(frames, made) == pytest.approx((255 - np.mean(off)) / 255, abs=1e-12)
    # Of eight frames the last has no neighbour to the right: three are made anew of 0, 2, 4, 6.
    eight = np.concatenate([frames, frames[:1]])
    assert vbench.smoothness(eight, made) == vbench.smoothness(frames, made)
    with pytest.raises(ValueError, match="must be frames 1, 3, 5"):
        vbench.smoothness(frames, made[:2])


def literal_moves(flow, size_hw, count):
    threshold, wanted, found = 6.0 * min(size_hw) / 256.0, round(4 * (count / 16.0)), 0
    for value in flow:
        found += value > threshold
        if found >= wanted:
            return True
    return False


def test_a_video_moves_where_enough_of_its_frames_do():
    for pairs in (1, 3, 7, 12, 15, 31, 40):
        for fast in range(pairs + 1):
            flow = RNG.permutation([13.0] * fast + [11.0] * (pairs - fast))
            assert vbench.moves(flow, (512, 768)) == literal_moves(flow, (512, 768), pairs + 1), (pairs, fast)


def test_quality_is_the_weighted_mean_of_scaled_scores():
    raw = dict(zip(vbench.RANGES, (0.9, 0.95, 0.98, 0.99, 0.5, 0.6, 0.7)))
    scaled = [(0.9 - 0.1462) / (1 - 0.1462), (0.95 - 0.2615) / (1 - 0.2615), (0.98 - 0.6293) / (1 - 0.6293),
              (0.99 - 0.706) / (0.9975 - 0.706), 0.5 * 0.5, 0.6, 0.7]  # fmt: skip
    assert vbench.quality(raw) == pytest.approx(100 * sum(scaled) / 6.5, abs=1e-9)
    assert vbench.quality({name: high for name, (_, high, _) in vbench.RANGES.items()}) == pytest.approx(100)
    with pytest.raises(KeyError, match="imaging_quality"):
        vbench.quality({k: v for k, v in raw.items() if k != "imaging_quality"})


def features(frames=9):
    made = (frames - 1) // 2
    return {
        "subject": RNG.normal(size=(frames, 4)), "background": RNG.normal(size=(frames, 3)),
        "interpolated": RNG.integers(0, 256, (made, 6, 8, 3), dtype=np.uint8), "flow": np.array([0.5, 3.0]),
        "aesthetic": np.full(frames, 5.5), "imaging": np.full(frames, 60.0), "video": RNG.normal(size=(2, 4)),
        "text": RNG.normal(size=(2, 4)), "style": RNG.normal(size=(1, 4)),
    }  # fmt: skip


def test_scores_take_what_is_given_and_nothing_else():
    frames = RNG.integers(0, 256, (9, 6, 8, 3), dtype=np.uint8)
    assert set(vbench.scores(frames, {})) == {"temporal_flickering"}
    given = features()
    found = vbench.scores(frames, given)
    assert set(found) == {*vbench.RANGES, "vbench_quality"}
    assert found["aesthetic_quality"] == pytest.approx(0.55) and found["imaging_quality"] == pytest.approx(0.6)
    assert found["dynamic_degree"] == 1.0  # one pair of two is enough: 3 pixels of 6 are more than 6 of 256
    cosines = [float(v @ t / np.linalg.norm(v) / np.linalg.norm(t)) for v, t in zip(given["video"], given["text"])]
    assert found["overall_consistency"] == pytest.approx(np.mean(cosines))
    without = vbench.scores(frames, {k: v for k, v in given.items() if k != "flow"})
    assert "vbench_quality" not in without and "dynamic_degree" not in without
    assert "overall_consistency" not in vbench.scores(frames, {"text": given["text"]})


@pytest.mark.parametrize("name, value, told", [
    ("subject", np.ones((8, 4)), "subject has 8 rows; the video has 9 frames"),
    ("imaging", np.ones((9, 1)), r"imaging \(9, 1\).*of 1 dimensions"),
    ("flow", np.array([1.0, np.nan]), "finite"),
    ("flow", np.zeros(0), "not empty"),
    ("Subject", np.ones((9, 4)), "known, finite and not empty are subject"),
])  # fmt: skip
def test_features_that_do_not_fit_are_refused_by_name(name, value, told):
    with pytest.raises(ValueError, match=told):
        vbench.scores(np.zeros((9, 6, 8, 3), np.uint8), {name: value})
