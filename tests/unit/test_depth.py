"""Dense depth from sparse points of procedural rooms, whose depth is exact, and its unit."""

import numpy as np
import pytest

from vgr.data.worlds import Scene, free_flight
from vgr.geometry.depth import MIN_POINTS, SparseDepth, densify, scale_to, seen

SIZE, K = (96, 128), np.array([0.6, 0.8, 0.5, 0.5])


def lifted(depth, c2w, pixels):
    """World points (N,3) of pixels (N,2) of a camera by its depth (H,W)."""
    z = depth[pixels[:, 1].astype(int), pixels[:, 0].astype(int)]
    ray = np.concatenate([(pixels / SIZE[::-1] - K[2:]) / K[:2], np.ones((len(pixels), 1))], axis=1)
    return (z[:, None] * ray) @ c2w[:3, :3].T + c2w[:3, 3]


def room(seed, count=250, noise=0.01, wrong=0.03):
    """Depth, cameras and sparse points from three frames, noise and a share of outliers in depth."""
    rng = np.random.default_rng(seed)
    scene = Scene(rng)
    c2w = free_flight(rng, scene, 3, 4.0)
    depth = np.stack([scene.depth(pose, K, 0.0, SIZE) for pose in c2w])
    rough = depth * np.exp(noise * rng.normal(size=depth.shape))
    bad = rng.random(depth.shape) < wrong
    rough[bad] *= np.exp(rng.uniform(-1, 1, bad.sum()))
    points = [lifted(d, pose, rng.uniform(0, SIZE[::-1], (count, 2))) for d, pose in zip(rough, c2w)]
    return depth, c2w, np.concatenate(points)


def test_rooms_come_back_from_sparse_points():
    errors = []
    for seed in range(4):
        depth, c2w, points = room(seed)
        found = densify(points, c2w, K, SIZE)
        assert found.dtype == np.float32 and found.shape == depth.shape and (found > 0).all()
        errors.append(np.abs(found / depth - 1))
    assert np.median(errors) < 0.02 and np.mean(np.array(errors) < 0.1) > 0.78


def test_planes_are_exact_and_beyond_the_points_the_nearest_holds():
    v, u = (np.indices(SIZE) + 0.5) / np.array(SIZE)[:, None, None]
    plane = (1 / (0.3 + 0.1 * (u - 0.5) + 0.2 * (v - 0.5))).astype(np.float32)  # inverse depth is linear on a plane
    rng, eye = np.random.default_rng(0), np.eye(4)
    pixels = np.floor(rng.uniform((24, 16), (104, 80), (200, 2))) + 0.5
    points = lifted(plane, eye, pixels)
    found = densify(points, eye[None], K, SIZE)[0]
    np.testing.assert_allclose(found[32:64, 40:88], plane[32:64, 40:88], rtol=1e-4)
    z = points[:, 2]
    assert z.min() - 1e-4 <= found.min() and found.max() <= z.max() + 1e-4


def test_points_behind_a_surface_and_strays_are_not_seen():
    rng, eye = np.random.default_rng(0), np.eye(4)
    pixels = rng.uniform((0, 0), SIZE[::-1], (900, 2))
    near, far = np.full(SIZE, 2.0), np.full(SIZE, 6.0)
    wall = np.abs(pixels - (64, 48)).max(axis=1) < 32  # a wall before another; half of it is seen through
    points = np.concatenate([
        lifted(near, eye, pixels[wall]), lifted(far, eye, pixels[~wall]), lifted(far, eye, pixels[wall][::4] + 0.3),
        [[0.0, 0.0, 0.4], [1.5, 1.1, 3.0]],
    ])  # fmt: skip
    places, z = seen(points, eye, K, SIZE)
    inside = np.abs(places - (64, 48)).max(axis=1) < 24
    assert set(np.unique(z.round(6))) == {2.0, 6.0} and (z[inside] == 2).mean() > 0.98
    assert len(z) > 0.95 * 900


def test_unregistered_frames_stay_unknown_and_too_few_points_are_an_error():
    depth, c2w, points = room(0)
    lost = c2w.copy()
    lost[1] = np.nan
    found = densify(points, lost, K, SIZE)
    assert (found[1] == 0).all() and (found[[0, 2]] > 0).all()
    with pytest.raises(ValueError, match=f"sees 5 at the most; depth wants {MIN_POINTS}.*depth network"):
        densify(lifted(depth[0], c2w[0], np.tile([[64.0, 48.0]], (5, 1))), c2w[:1], K, SIZE)
    line = lifted(np.full(SIZE, 2.0), np.eye(4), np.stack([np.arange(4.5, 120, 4), np.full(29, 48.5)], axis=1))
    np.testing.assert_allclose(densify(line, np.eye(4)[None], K, SIZE), 2.0)  # no triangle, but a nearest point


def test_the_estimator_is_called_with_the_frames_of_its_cameras():
    depth, c2w, points = room(1)
    estimate = SparseDepth(points, c2w, K)
    np.testing.assert_array_equal(estimate(np.zeros((3, *SIZE, 3), np.uint8)), densify(points, c2w, K, SIZE))
    with pytest.raises(ValueError, match="2 frames, but cameras of 3"):
        estimate(np.zeros((2, *SIZE, 3), np.uint8))


def test_metres_are_brought_to_the_unit_of_the_points():
    depth, c2w, points = room(2)
    metres = 3.7 * depth[:, ::2, ::2]
    assert scale_to(metres, points, c2w, K) == pytest.approx(1 / 3.7, rel=0.01)
    metres[0, :20] = 0  # unknown, and a third of the rest wrong
    metres[2] *= 5
    assert scale_to(metres, points, c2w, K) == pytest.approx(1 / 3.7, rel=0.05)
    with pytest.raises(ValueError, match="0 sparse points fall on known depth"):
        scale_to(np.zeros((3, 48, 64)), points, c2w, K)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"points_N3": np.zeros((5, 2))}, r"\(N, 3\)"),
        ({"points_N3": np.full((5, 3), np.nan)}, "finite"),
        ({"c2w_F44": np.eye(4)}, r"c2w must be"),
        ({"intrinsics": K[:3]}, r"intrinsics \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(change, told):
    good = {"points_N3": np.zeros((50, 3)), "c2w_F44": np.eye(4)[None], "intrinsics": K, "size_hw": SIZE}
    with pytest.raises(ValueError, match=told):
        densify(**(good | change))
