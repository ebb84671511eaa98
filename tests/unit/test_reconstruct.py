"""Reconstructed cameras against exact ones: synthetic matches, procedural rooms, and (slow) a game engine."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vgr.data.worlds import Scene, Thing, textures
from vgr.geometry import reconstruct as module
from vgr.geometry.mapping import map_frames, match_frames
from vgr.geometry.reconstruct import Reconstruction, reconstruct
from vgr.metrics.camera_pose import pose_errors

K = np.array([0.6, 0.8, 0.5, 0.5])
SIZE = (96, 128)


def turning(frames, rng, step=0.03):
    """c2w (F,4,4) that only turn."""
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    vectors = np.cumsum(rng.normal(scale=step, size=(frames, 3)), axis=0)
    c2w[:, :3, :3] = Rotation.from_rotvec(vectors).as_matrix()
    return c2w


def seen(points, c2w, k=K):
    """Pixels (N,2), and which points are in the picture."""
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    pixels = (local[:, :2] / local[:, 2:] * k[:2] + k[2:]) * SIZE[::-1]
    return pixels, (local[:, 2] > 0.1) & (pixels > 0).all(1) & (pixels < SIZE[::-1]).all(1)


def matches(c2w, points, rng, noise, wrong=0.2, reach=4):
    """Pairs up to `reach` frames apart, with noise in pixels and a share of nonsense."""
    pairs = {}
    for a in range(len(c2w)):
        for b in range(a + 1, min(a + reach + 1, len(c2w))):
            (p, here), (q, there) = seen(points, c2w[a]), seen(points, c2w[b])
            p, q = p[here & there], q[here & there]
            q = q + noise * rng.normal(size=q.shape)
            bad = rng.random(len(q)) < wrong
            q[bad] = rng.uniform(0, SIZE[::-1], (bad.sum(), 2))
            pairs[a, b] = (p, q)
    return pairs


def empty(frames, k=K):
    return Reconstruction(np.full((frames, 4, 4), np.nan), k, "none", 0.0, math.nan, 0.0, np.zeros((0, 3)), False, "")


def rotation_errors(c2w, found):
    turn = (found[0, :3, :3].T @ found[:, :3, :3]).swapaxes(1, 2) @ (c2w[0, :3, :3].T @ c2w[:, :3, :3])
    return np.rad2deg(Rotation.from_matrix(turn).magnitude())


def test_turns_come_from_matches_alone_in_spite_of_wrong_ones():
    rng = np.random.default_rng(0)
    c2w = turning(12, rng)
    points = rng.normal(size=(600, 3)) * (20, 20, 3) + (0, 0, 40)
    found, left = module._rotations(matches(c2w, points, rng, noise=0.0), empty(12), SIZE)
    assert found.motion == "rotation" and found.registered == 1 and left < 0.01
    assert rotation_errors(c2w, found.c2w).max() < 0.05  # the wrong matches keep a little say
    np.testing.assert_array_equal(found.c2w[:, :3, 3], 0)
    noisy, left = module._rotations(matches(c2w, points, rng, noise=0.3, wrong=0.0), empty(12), SIZE)
    assert rotation_errors(c2w, noisy.c2w).max() < 0.1 and 0.1 < left < module._TURNED_PX


def test_a_turn_finds_the_focal_length_and_frames_without_matches_stay_unknown():
    rng = np.random.default_rng(1)
    c2w = turning(10, rng, step=0.08)
    points = rng.normal(size=(900, 3)) * (40, 40, 10) + (0, 0, 40)
    pairs = matches(c2w, points, rng, noise=0.0, wrong=0.0)
    found, _ = module._rotations(pairs, empty(10, np.full(4, np.nan)), SIZE)
    np.testing.assert_allclose(found.intrinsics, K, rtol=1e-3)
    cut = {pair: both for pair, both in pairs.items() if pair[1] < 7}
    found, _ = module._rotations(cut, empty(10), SIZE)
    assert found.registered == 0.7 and np.isnan(found.c2w[7:]).all()
    assert rotation_errors(c2w[:7], found.c2w[:7]).max() < 1e-3


def test_walking_is_no_turn():
    rng = np.random.default_rng(2)
    c2w = turning(8, rng)
    c2w[:, 0, 3] = 0.2 * np.arange(8)
    points = rng.uniform(-4, 4, size=(600, 3)) + (0, 0, 7)
    assert module._rotations(matches(c2w, points, rng, noise=0.0, wrong=0.0), empty(8), SIZE)[1] > module._TURNED_PX


def test_the_unit_is_the_median_depth_or_metres_of_the_maps():
    pixels = {i: np.array([[10.5, 20.5], [100.5, 50.5], [64.0, 48.0]]) for i in range(3)}
    depths = {i: np.array([1.0, 2.0, 4.0]) for i in range(3)}
    assert module._unit(pixels, depths, None, SIZE) == (0.5, 0.0)
    assert module._unit(pixels, depths, np.array(6.0), SIZE) == (3.0, 0.0)
    maps = np.zeros((3, 48, 64))  # half the size; unknown but for two of the three places
    maps[:, 10, 5], maps[:, 25, 50] = 3.0, 6.0
    maps[2] *= 2
    unit, spread = module._unit(pixels, depths, maps, SIZE)
    assert unit == 3.0 and spread == pytest.approx(np.std([3, 3, 6]) / 4)
    assert module._unit(pixels, depths, np.zeros((3, 4, 4)), SIZE)[1] == math.inf


def test_cameras_are_judged():
    c2w = np.tile(np.eye(4), (20, 1, 1))
    c2w[:, 0, 3] = 0.1 * np.arange(20)
    good = dataclasses.replace(empty(20), c2w=c2w, motion="structure", registered=1.0, reprojection_px=0.3)
    assert module._judged(good).reason == ""
    jump = c2w.copy()
    jump[9, 0, 3] += 1.0
    swing = c2w.copy()
    swing[9, :3, :3] = Rotation.from_rotvec([0, 0.3, 0]).as_matrix()
    narrow = np.array([4.0, 4.0, 0.5, 0.5])
    for changed, told in (
        ({"c2w": jump}, "position jumps at frame 9"),
        ({"c2w": swing}, "direction jumps at frame 9"),
        ({"reprojection_px": 3.0}, "3.0 pixels off"),
        ({"registered": 0.3}, "only 20 of 20 frames"),
        ({"agreement": 0.5}, "explain 50% of the matches only"),
        ({"intrinsics": narrow}, "field of view 14 x 14"),
    ):
        assert told in module._judged(dataclasses.replace(good, **changed)).reason


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"frames_FHW3": np.zeros((1, 8, 8, 3), np.uint8)}, "F >= 2"),
        ({"frames_FHW3": np.zeros((3, 8, 8, 3), np.float32)}, "float32"),
        ({"intrinsics": [1, 1, 0.5]}, r"finite \(4,\)"),
        ({"intrinsics": [0, 1, 0.5, 0.5]}, r"finite \(4,\)"),
        ({"mapper": "slam"}, "global, incremental"),
        ({"depth_m": -1.0}, "depth_m"),
        ({"depth_m": np.ones((2, 8, 8))}, r"maps \(3, h, w\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, told):
    with pytest.raises(ValueError, match=told):
        reconstruct(**({"frames_FHW3": np.zeros((3, 8, 8, 3), np.uint8)} | arguments))


def test_blank_frames_fail_with_a_reason():
    pytest.importorskip("pycolmap")
    found = reconstruct(np.full((3, 48, 64, 3), 90, np.uint8), K)
    assert found.motion == "none" and found.registered == 0 and "texture" in found.reason and np.isnan(found.c2w).all()


def picture(rng):
    """A wall to look at: blobs of many sizes (H,W,3)."""
    import cv2

    sizes = 32, 96, 200
    blobs = [cv2.resize(rng.uniform(0, 255, (n, n)), (1024, 1024), interpolation=cv2.INTER_CUBIC) for n in sizes]
    return np.repeat(np.clip(sum(blobs) / 3, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def test_turning_before_a_picture_gives_rotations_with_pycolmap():
    import cv2

    pytest.importorskip("pycolmap")
    rng = np.random.default_rng(3)
    c2w, wall, far = turning(6, rng, step=0.02), picture(rng), np.diag([0.002, 0.002, 1.0])
    far[:2, 2] = -0.002 * 512
    pixels = np.array([[K[0] * 128, 0, 64], [0, K[1] * 96, 48], [0, 0, 1]])
    frames = [cv2.warpPerspective(wall, pixels @ pose[:3, :3].T @ far, SIZE[::-1]) for pose in c2w]
    found = reconstruct(np.stack(frames), K)
    assert found.motion == "rotation" and found.reason == "" and found.registered == 1
    assert rotation_errors(c2w, found.c2w).mean() < 0.1


@pytest.fixture(scope="module")
def walk():
    """Frames (10,240,320,3), c2w and length in metres of a walk past boxes that stand in a room, of fine texture."""
    rng = np.random.default_rng(0)
    scene, still = Scene(rng), np.zeros(3)
    scene.things[:] = [dataclasses.replace(thing, swing=still) for thing in scene.things]
    for _ in range(12):
        half, centre = rng.uniform(0.15, 0.4, 3).astype(np.float32), rng.uniform((-2, -2.2, 0.3), (2, -0.3, 2.2))
        look = textures(rng, rng.uniform(0.3, 0.7, (1, 3)), np.array([0.12]))
        scene.put(Thing("box", "red", half, centre, still, 0.0, 0.0), look)
    c2w, s = np.tile(np.eye(4), (10, 1, 1)), np.linspace(0, 1, 10)
    c2w[:, :3, :3] = Rotation.from_euler("YX", np.stack([np.sin(3 * s) / 4, np.sin(2 * s) / 10], axis=1)).as_matrix()
    c2w[:, :3, 3] = np.stack([s - 0.5, np.sin(4 * s) / 5 - 1.2, s / 2 - 1.8], axis=1)
    frames = np.stack([scene.render(pose, K, 0.0, (240, 320)) for pose in c2w])
    return frames, c2w, np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1).sum()


@pytest.mark.parametrize(("mapper", "given"), [("global", True), ("global", False), ("incremental", True)])
def test_a_walk_through_a_room_comes_back_by_either_mapper_alone(walk, monkeypatch, mapper, given):
    pycolmap, (frames, c2w, length) = pytest.importorskip("pycolmap"), walk
    other = "incremental_mapping" if mapper == "global" else "global_mapping"
    monkeypatch.setattr(pycolmap, other, lambda *args: pytest.fail(f"{other} was asked"))
    found = reconstruct(frames, K if given else None, mapper=mapper)
    errors = pose_errors(found.c2w, c2w)
    assert found.reason == "" and found.registered == 1 and found.motion == "structure" and found.agreement > 0.9
    assert errors["rot_mean_deg"] < 0.06 and errors["trans_mean"] < 0.002 * length  # without `_refined` 0.09, 0.0023
    np.testing.assert_allclose(found.intrinsics, K, rtol=0 if given else 0.01)
    if given:
        np.testing.assert_array_equal(reconstruct(frames, K, mapper=mapper).c2w, found.c2w)


def test_a_map_of_near_frames_keeps_no_others_and_stands_by_itself(walk, tmp_path):
    pycolmap, (frames, c2w, _) = pytest.importorskip("pycolmap"), walk
    match_frames(tmp_path, frames, K, 0)
    model = map_frames(tmp_path, "global", 2, False, 0, False)
    with pycolmap.Database.open(tmp_path / "database.db") as known:
        pairs = [pycolmap.pair_id_to_image_pair(pair) for pair in known.read_two_view_geometries()[0]]
    assert {abs(a - b) for a, b in pairs} == {1, 2}
    found = np.stack([np.linalg.inv(np.vstack([i.cam_from_world().matrix(), [0, 0, 0, 1]])) for i in sorted(
        model.images.values(), key=lambda image: image.name)])  # fmt: skip
    assert pose_errors(found, c2w)["rot_mean_deg"] < 0.1


ALL = ["global", "incremental", "global, 2", "incremental, 3"]


@pytest.mark.parametrize(
    ("results", "asked", "chosen"),
    [
        ({"global": (1.0, 0.95, "")}, ["global"], "global"),
        ({"global": (1.0, 0.95, "jumps"), "incremental": (1.0, 0.7, "")}, ["global", "incremental"], "incremental"),
        ({"global": (0.8, 0.95, ""), "incremental": (1.0, 0.9, "")}, ["global", "incremental"], "incremental"),
        ({"global": (0.9, 0.95, ""), "incremental": (1.0, 0.75, "")}, ["global", "incremental"], "global"),
        ({"global": (1.0, 0.4, "wrong"), "incremental": (1.0, 0.5, "wrong")}, ALL, "incremental"),
        ({"global": (1.0, 0.4, "wrong"), "global, 2": (1.0, 0.7, "")}, ALL[:3], "global, 2"),
        ({"incremental, 3": (0.6, 0.9, "")}, ALL, "incremental, 3"),
        ({"incremental": (0.6, 0.9, "")}, ["global", "incremental"], "incremental"),
        ({}, ALL, None),
    ],
)
def test_the_other_mapper_is_asked_where_the_first_fails_and_the_better_one_is_taken(
    monkeypatch, results, asked, chosen
):
    c2w = turning(3, np.random.default_rng(0))
    found = {
        way: dataclasses.replace(empty(3), c2w=c2w, registered=share, agreement=agreement, reason=reason)
        for way, (share, agreement, reason) in results.items()
    }
    calls = []

    def ask(folder, way, overlap, *args, **kw):
        calls.append(way if overlap == 5 else f"{way}, {overlap}")
        return found.get(calls[-1])

    monkeypatch.setattr(module, "match_frames", lambda *args: {(0, 1): ()})
    monkeypatch.setattr(module, "_rotations", lambda *args: (empty(3), 10.0))
    monkeypatch.setattr(module, "map_frames", ask)
    monkeypatch.setattr(module, "_structure", lambda model, *args: model)
    best = reconstruct(np.zeros((3, 8, 8, 3), np.uint8), K)
    assert calls == asked
    assert best is found[chosen] if chosen else "no structure was found from 10.0 pixels" in best.reason


@pytest.mark.parametrize(
    ("agreements", "refused", "told"),
    [((0.72, 0.74), "", "differ by 2.0 degrees"), ((0.5, 0.95), "", ""), ((0.5, 0.74), "explain 50 %", "")],
)
def test_cameras_that_two_mappers_tell_differently_are_refused_unless_sure(monkeypatch, agreements, refused, told):
    poses = np.stack([turning(4, np.random.default_rng(0))] * 2)
    turns = Rotation.from_euler("y", np.array([[0], [2], [4], [6]]), degrees=True).as_matrix()
    poses[1, :, :3, :3] = turns @ poses[1, :, :3, :3]
    found = {
        way: dataclasses.replace(empty(4), c2w=c2w, registered=1.0, agreement=agreement, reason=reason)
        for way, c2w, agreement, reason in zip(module.MAPPERS, poses, agreements, (refused, ""))
    }
    monkeypatch.setattr(module, "match_frames", lambda *args: {(0, 1): ()})
    monkeypatch.setattr(module, "_rotations", lambda *args: (empty(4), 10.0))
    monkeypatch.setattr(module, "map_frames", lambda folder, way, *args, **kw: way)
    monkeypatch.setattr(module, "_structure", lambda way, *args: found[way])
    best = reconstruct(np.zeros((4, 8, 8, 3), np.uint8), K)
    assert best.agreement == agreements[1] and (told in best.reason if told else best.reason == "")


@pytest.mark.slow
@pytest.mark.parametrize("visit", [2, 3])
def test_walks_of_an_engine_come_back(visit):
    """Two of the walks of benchmarks/poses.py, with depth for metres, and the same result twice."""
    pytest.importorskip("pycolmap")
    from vgr.data.doom import DoomSource

    clip = DoomSource(33, (480, 640), depth=True, clips_per_visit=1).capture(0, "val", visit)[0]
    found = reconstruct(clip.frames, clip.intrinsics[0], depth_m=clip.depth)
    length = np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1).sum()
    errors = pose_errors(found.c2w, clip.c2w)
    assert found.reason == "" and found.registered == 1 and found.motion == "structure" and found.metric
    assert errors["rot_mean_deg"] < 0.1 and errors["trans_mean"] < 0.01 * length
    assert errors["scale"] == pytest.approx(1, abs=0.1)  # the engine's depth is good to 0.2 m
    if visit == 3:
        again = reconstruct(clip.frames, clip.intrinsics[0], depth_m=clip.depth)
        np.testing.assert_array_equal(again.c2w, found.c2w)
