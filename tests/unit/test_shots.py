import itertools

import cv2
import numpy as np
import pytest

from benchmarks.memory import recurrence_similarity
from vgr.data.stories import StorySource
from vgr.data.worlds import WorldSource
from vgr.metrics.shots import detect_cuts, detect_jumps, no_cut_floor, shot_consistency, shot_cut_accuracy
from vgr.metrics.statistics import mean_interval


@pytest.fixture(scope="module")
def told():
    source = StorySource(size_hw=(32, 32), shots=(5, 6))
    return [(source.clip(9, "val", i), source.masks(9, "val", i)) for i in range(8)]


@pytest.mark.parametrize("shots, floor", [(3, 0.513), (4, 0.472), (5, 0.449)])
def test_no_cut_floor_of_equal_shots_is_the_specs(shots, floor):
    frames = 60 * shots
    cuts = [60 * s for s in range(1, shots)]
    assert no_cut_floor(cuts, frames) == pytest.approx(floor, abs=5e-4)
    assert shot_cut_accuracy(cuts, cuts, frames) == 1.0
    # Offsets of single frames, and one extra cut at the price of a shot's length.
    assert shot_cut_accuracy([c + 2 for c in cuts], cuts, frames) == pytest.approx(np.exp(-2 * len(cuts) / frames))
    assert shot_cut_accuracy([*cuts, 7], cuts, frames) == pytest.approx(np.exp(-1 / shots))
    assert shot_cut_accuracy(cuts, cuts, frames, shots=7) == 1.0
    assert shot_cut_accuracy([], cuts, frames, shots=7) == pytest.approx(np.exp(-len(cuts) / 7))


def test_the_matching_is_the_best_of_all():
    rng = np.random.default_rng(0)
    frames = 100
    for _ in range(60):
        found, wanted = (np.sort(rng.choice(np.arange(1, frames), rng.integers(0, 5), replace=False)) for _ in "ab")
        penalty = frames / (len(wanted) + 1)
        best = min(
            sum(abs(int(a) - int(b)) for a, b in zip(some, order))
            + penalty * (len(found) + len(wanted) - 2 * count)
            for count in range(min(len(found), len(wanted)) + 1)
            for some in itertools.combinations(found, count)
            for order in itertools.permutations(wanted, count)
        )
        assert shot_cut_accuracy(found, wanted, frames) == pytest.approx(np.exp(-best / frames))


def test_cuts_outside_the_video_are_refused():
    with pytest.raises(ValueError, match="predicted_cuts"):
        shot_cut_accuracy([0], [5], 10)
    with pytest.raises(ValueError, match="target_cuts"):
        shot_cut_accuracy([], [10], 10)


def test_true_cuts_are_found_and_flights_have_none(told):
    for clip, _ in told:
        assert detect_cuts(clip.frames) == [s["start"] for s in clip.shots[1:]]
        first = clip.frames[: clip.shots[0]["end"]]
        assert detect_cuts(first) == [] and detect_cuts(first[:1]) == []
    # Fast flights with six degrees of freedom: much motion, no cut.
    source = WorldSource(40, (32, 32), fps=8.0, cut_share=0.0, depth=False)
    assert all(detect_cuts(source.clip(1, "val", i).frames) == [] for i in range(4))
    dark = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)  # noise has one distribution
    assert detect_cuts(dark) == []


def repaint(clip, mask, shot, colour):
    video = clip.frames.copy()
    span = slice(shot["start"], shot["end"])
    video[span][mask[span] > 0] = colour
    return video


def test_the_true_video_is_at_no_distance_and_noise_hardly_matters(told):
    rng = np.random.default_rng(1)
    for clip, mask in told:
        noisy = np.clip(clip.frames + rng.normal(0, 6, clip.frames.shape), 0, 255).astype(np.uint8)
        true, near = (recurrence_similarity(v, clip.frames, mask, clip.shots) for v in (clip.frames, noisy))
        wanted = [(i, s["returns_from"]) for i, s in enumerate(clip.shots) if s["returns_from"] is not None]
        assert [(r.shot, r.first) for r in true] == wanted
        for r, n in zip(true, near, strict=True):
            assert r.distance == 0 and r.similarity == 1 and r.identified
            assert r.self_distance == r.true_self_distance < 15
            assert n.distance < 6 and n.similarity > 0.9 and n.identified


def test_another_look_is_far_and_another_characters_look_is_named(told):
    """Who returns with a colour of another story is far off; with another one's of its story, it is taken for them."""
    apart = []
    for n, (clip, mask) in enumerate(told):
        other, other_mask = told[(n + 1) % len(told)]
        looks = {s["id"]: clip.frames[s["start"]][mask[s["start"]] > 0].mean(0) for s in clip.shots if s["id"]}
        stranger = other.frames[0][other_mask[0] > 0].mean(0)
        for k, r in enumerate(recurrence_similarity(clip.frames, clip.frames, mask, clip.shots)):
            shot = clip.shots[r.shot]
            wrong = looks[next(i for i in looks if i != shot["id"])]
            taken = recurrence_similarity(repaint(clip, mask, shot, wrong), clip.frames, mask, clip.shots)
            assert not taken[k].identified and taken[k].distance > 25 and taken[k].similarity < 0.6
            assert taken[k].self_distance > 25
            assert all(t == r for j, (t, r) in enumerate(zip(
                taken, recurrence_similarity(clip.frames, clip.frames, mask, clip.shots))) if j != k)
            video = repaint(clip, mask, shot, stranger)
            apart.append(recurrence_similarity(video, clip.frames, mask, clip.shots)[k].distance)
    assert mean_interval(apart).low > 20


def test_shapes_that_differ_are_refused(told):
    clip, mask = told[0]
    with pytest.raises(ValueError, match="must agree"):
        recurrence_similarity(clip.frames[:9], clip.frames, mask, clip.shots)


def test_cuts_between_like_colours_are_seen_by_where_they_stand():
    """A picture and its mirror image have one distribution of colours; a fast pan has no cut."""
    rng = np.random.default_rng(0)
    wide = cv2.resize(rng.integers(0, 255, (6, 24, 3), dtype=np.uint8), (384, 96), interpolation=cv2.INTER_LINEAR)
    pan = np.stack([wide[:, 6 * f : 6 * f + 128] for f in range(24)])
    assert detect_jumps(pan) == []
    slow = np.stack([wide[:, f : f + 128] for f in range(12)])
    cut = np.concatenate([slow, slow[:, :, ::-1]])
    assert detect_cuts(cut) == [] and detect_jumps(cut) == [12]


def test_shots_of_one_subject_lie_between_floor_and_ceiling():
    """Features that are directions in a plane: their cosines are those of known angles."""
    def at(*degrees):
        return np.stack([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))], axis=1)

    video = np.concatenate([at(0, 0, 10, 10), at(90, 90), at(35, 35, 35)])
    found = shot_consistency(video, [0, 4, 6], [(2, 0)])
    cos = lambda degrees: np.cos(np.deg2rad(degrees))  # noqa: E731
    assert found["inter_shot"] == pytest.approx(cos(30))  # the first shot's mean lies at 5 degrees
    assert found["inter_shot_floor"] == pytest.approx((cos(85) + cos(55)) / 2)
    assert found["inter_shot_ceiling"] == pytest.approx((cos(10) + 1 + 1) / 3)
    own, floor, ceiling = (found[f"inter_shot{end}"] for end in ("", "_floor", "_ceiling"))
    assert found["inter_shot_scaled"] == pytest.approx((own - floor) / (ceiling - floor))
    first = ((1 + 1) + (cos(10) + cos(10)) + (1 + cos(10))) / 6
    assert found["intra_shot"] == pytest.approx((first + 1 + 1) / 3)
    assert set(shot_consistency(video, [0, 4, 6])) == {"intra_shot"}
    assert "inter_shot_floor" not in shot_consistency(video, [0, 4], [(0, 1)])  # no other pair to tell chance by
    for starts, returns, told in (([0, 4, 4], (), "every shot has frames"), ([1, 4], (), "rise from 0"),
                                  ([0, 4], [(0, 2)], "of 2 shots"), ([0, 4], [(1, 1)], "pairs of two")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            shot_consistency(video, starts, returns)
