"""What matches say of each other and of cameras, on tracks and points that are made."""

import numpy as np
from scipy.spatial.transform import Rotation

from vgr.geometry.matches import contradicted, explained

K, SIZE = np.array([0.6, 0.8, 0.5, 0.5]), (480, 640)


def corridor(frames=8, reach=4, step=20, life=100):
    """Matches of a walk along a wall: frame i sees features step * i to step * i + life of it, as its own 7 i later."""
    return {
        (i, j): np.array([(n + 7 * i, n + 7 * j) for n in range(step * j, step * i + life)])
        for i in range(frames) for j in range(i + 1, min(i + reach + 1, frames))
    }  # fmt: skip


def test_pairs_of_another_tile_are_contradicted_by_the_frames_between():
    matches = corridor()
    assert contradicted(matches) == set()
    # Frames five apart see nothing of the wall in common, but it looks alike 80 features on.
    wrong = {(i, i + 5): np.array([(n + 7 * i, n + 80 + 7 * (i + 5)) for n in range(20 * i + 20, 20 * i + 100)])
             for i in range(1, 3)}  # fmt: skip
    assert contradicted(matches | wrong) == set(wrong)
    # A few wrong ones among good ones are for the mapper to find, and neighbours go before all.
    some = matches[1, 3].copy()
    some[:5, 1] = np.roll(some[:5, 1], 1)
    assert contradicted(matches | {(1, 3): some}) == set()
    some[:, 1] = np.roll(some[:, 1], 1)
    assert contradicted(matches | {(1, 3): some}) == {(1, 3)}


def test_pairs_of_which_nothing_is_known_are_kept():
    far = {(0, 4): np.stack([np.arange(20)] * 2, axis=1)}
    assert contradicted(far) == set() and contradicted({}) == set()


def walk(frames=6):
    """c2w (F,4,4), and the matched pixels of neighbours, of points before the cameras."""
    rng = np.random.default_rng(0)
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, :3, :3] = Rotation.from_rotvec(0.02 * np.cumsum(rng.normal(size=(frames, 3)), axis=0)).as_matrix()
    c2w[:, :3, 3] = np.arange(frames)[:, None] * (0.1, 0.02, 0.3)
    points = rng.uniform(-1, 1, (200, 3)) * (3, 2, 2) + (0, 0, 8)
    local = [(points - c[:3, 3]) @ c[:3, :3] for c in c2w]
    pixels = [(p[:, :2] / p[:, 2:] * K[:2] + K[2:]) * SIZE[::-1] for p in local]
    return c2w, {(i, i + 1): (pixels[i], pixels[i + 1]) for i in range(frames - 1)}


def test_true_cameras_explain_their_matches_and_wrong_ones_do_not():
    c2w, pairs = walk()
    np.testing.assert_array_equal(explained(pairs, c2w, K, SIZE), np.ones(5))
    scaled = c2w.copy()
    scaled[:, :3, 3] *= 7  # matches know no unit
    np.testing.assert_array_equal(explained(pairs, scaled, K, SIZE), np.ones(5))
    c2w[3:, :3, :3] = c2w[3:, :3, :3] @ Rotation.from_rotvec([0.03, 0, 0]).as_matrix()
    shares = explained(pairs, c2w, K, SIZE)
    assert shares[2] < 0.3 and shares[:2].tolist() == [1, 1]
    back = walk()[0][::-1].copy()  # the way run backwards: the same lines, but behind the camera
    assert explained(pairs, back, K, SIZE).max() < 0.5


def test_frames_that_are_not_known_are_passed_over():
    c2w, pairs = walk()
    c2w[2] = np.nan
    assert len(explained(pairs, c2w, K, SIZE)) == 3
    assert len(explained({}, c2w, K, SIZE)) == 0
