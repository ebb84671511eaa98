"""Features and matches led by the motion of the picture."""

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from vgr.geometry import features  # noqa: E402


def texture(height, width, seed=0, cell=4):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // cell, width // cell)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def shifted(picture, steps, size, step):
    """Windows (F,H,W) of a picture, each further right by `step` pixels, so that its content moves left."""
    return np.stack([picture[: size[0], step * i : step * i + size[1]] for i in range(steps)])


def test_points_count_from_the_corner_of_the_picture():
    y, x = np.mgrid[:120, :160]
    picture = (200 * np.exp(-((x - 90.25) ** 2 + (y - 50.5) ** 2) / 50)).astype(np.uint8)
    found = features.detect(picture)
    off = np.abs(found.points - (90.75, 51.0)).max(1)
    assert len(off) and off.min() < 0.3
    np.testing.assert_allclose(np.linalg.norm(found.descriptors, axis=1), 1, atol=1e-5)
    nothing = features.detect(np.zeros((64, 64), np.uint8))
    assert nothing.points.shape == (0, 2) and not len(features.match(nothing, found, nothing.points, 20.0))


def test_features_are_spread_over_what_is_bright_and_what_is_dark():
    picture = texture(240, 320)
    picture[:, 40:] = 20 + picture[:, 40:] // 12  # all but the left eighth is dark and faint
    found = features.detect(picture).points
    share = np.histogram(found[:, 0], 8, (0, 320))[0] / len(found)
    assert len(found) == features.FEATURES and share.min() > 0.06 and share.max() < 0.3
    again = features.detect(picture)
    np.testing.assert_array_equal(again.points, found)


def test_repeating_texture_is_matched_where_it_moved_to_and_not_a_tile_further():
    tile = texture(48, 48, cell=3)
    wide = np.tile(tile, (5, 12))
    wide = (wide * 0.95 + 0.05 * texture(*wide.shape, seed=1, cell=8)).astype(np.uint8)  # tiles are not quite alike
    frames = shifted(wide, 5, (240, 320), 11)
    noise = np.random.default_rng(0).normal(0, 4, frames.shape)  # and no frame is a copy of another
    frames = (frames + noise).clip(0, 255).astype(np.uint8)
    flow = features.flows(frames)
    found = [features.detect(x) for x in frames]
    led = found[0].points
    for f in flow:
        led = features.follow(led, f)
    both = features.match(found[0], found[4], led, 14.0)
    moved = found[4].points[both[:, 1]] - found[0].points[both[:, 0]]
    right = np.abs(moved - (-44, 0)).max(1) < 1.5
    assert len(both) > 500 and right.mean() > 0.97
    # The whole picture has as good a match a tile (48 pixels) further: few are left, and many of another tile.
    far = features.match(found[0], found[4], led, 1e6)
    sure = np.abs(found[4].points[far[:, 1]] - found[0].points[far[:, 0]] - (-44, 0)).max(1) < 1.5
    assert sure.sum() < right.sum() / 2


def test_matches_are_mutual_and_the_whole_picture_is_searched_where_flow_is_lost():
    picture = texture(260, 700)
    frames = shifted(picture, 2, (240, 320), 130)
    a, b = (features.detect(x) for x in frames)
    both = features.match(a, b, a.points, 12.0)  # led to where nothing went
    moved = b.points[both[:, 1]] - a.points[both[:, 0]]
    assert len(both) > 100 and (np.abs(moved - (-130, 0)).max(1) < 1.5).mean() > 0.95
    for side in both.T:
        assert len(np.unique(side)) == len(side)
    # Candidates may come in any order, and few of them are compared in another way than many.
    i, j = np.indices((len(a.points), len(b.points))).reshape(2, -1)
    mixed = np.random.default_rng(0).permutation(len(i))
    np.testing.assert_array_equal(features._mutual(a, b, i, j), features._mutual(a, b, i[mixed], j[mixed]))
    likeness = a.descriptors @ b.descriptors.T
    best = features._mutual(a, b, *both.T)  # each one's only candidate, so all that are near enough stay
    near = np.arccos(likeness[both[:, 0], both[:, 1]].clip(-1, 1)) < 0.7
    assert near.all() and set(map(tuple, best)) == set(map(tuple, both))


def test_following_leaves_the_picture_and_takes_no_other_pixels_flow():
    flow = np.zeros((10, 20, 2), np.float32)
    flow[4, 7] = (30, -2)
    points = np.array([[7.5, 4.5], [8.5, 4.5], [-3.0, 4.0]])
    np.testing.assert_array_equal(features.follow(points, flow), [[37.5, 2.5], [8.5, 4.5], [-3.0, 4.0]])
