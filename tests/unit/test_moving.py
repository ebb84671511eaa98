"""What moves on its own in procedural rooms, whose depth, cameras and things are exact, and where it goes."""

from functools import lru_cache

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vgr.data.worlds import Scene, Thing, free_flight, textures
from vgr.geometry.moving import Moving, carry, moving_mask, own_motion
from vgr.geometry.warp import Keyframes, warp

SIZE, FPS, FRAMES = (96, 160), 16.0, 13
K = np.array([0.6, 1.0, 0.5, 0.5])
TIME = np.arange(FRAMES) / FPS


def cameras(path, rng, scene):
    c2w = free_flight(rng, scene, FRAMES, FPS)
    if path != "flight":
        c2w = np.tile(c2w[:1], (FRAMES, 1, 1))
    if path == "dolly":
        c2w[:, :3, 3] += 0.8 * TIME[:, None] * c2w[0, :3, 2]
    if path == "truck":
        c2w[:, :3, 3] += 0.8 * TIME[:, None] * c2w[0, :3, 0]
    if path == "pan":
        c2w[:, :3, :3] = c2w[0, :3, :3] @ Rotation.from_rotvec(np.outer(0.4 * TIME, [0, 1, 0])).as_matrix()
    return c2w


@lru_cache
def shot(path, seed, size=0.0, wall_contrast=1.0):
    """Frames, depth, cameras and mask (F,H,W) of a room that stands still, but for one thing of that half size
    straight on, 2 m away in the middle of the shot; and where the thing is, (F,3)."""
    rng = np.random.default_rng(seed)
    scene = Scene(rng, wall_contrast)
    scene.things = [Thing(t.shape, t.colour, t.half, t.centre, 0 * t.swing, t.rate, t.phase) for t in scene.things]
    c2w = cameras(path, rng, scene)
    where = np.zeros((FRAMES, 3))
    if size:
        middle = c2w[FRAMES // 2]
        speed = middle[:3, :3] @ rng.choice([[0.8, 0.2, 0.4], [-0.9, 0.1, -0.3], [0.6, -0.2, -0.5]])
        # A slow swing about its middle is as good as a straight way.
        thing = Thing(
            str(rng.choice(["box", "sphere"])), "red", np.full(3, size, np.float32),
            middle[:3, 3] + 2.0 * middle[:3, 2], 100 * speed, 1 / (200 * np.pi), -TIME[FRAMES // 2] / 100,
        )  # fmt: skip
        scene.put(thing, textures(rng, np.array([[0.6, 0.4, 0.3]]), np.array([0.35])))
        where = np.stack([thing.at(t) for t in TIME])
    seen = [np.stack([of(p, K, t, SIZE) for p, t in zip(c2w, TIME)]) for of in (scene.render, scene.depth, scene.which)]
    return (*seen[:2], c2w, (seen[2] == len(scene.things)) & (size > 0), where)


def keyframe(frames, depth, c2w, f):
    image, depth, k, pose = (torch.from_numpy(x[None]) for x in (frames[f], depth[f], K, c2w[f]))
    return Keyframes(image.permute(0, 3, 1, 2) / 255, depth, k, pose)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


PATHS = ["static", "dolly", "truck", "pan", "flight"]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_moves_where_only_the_camera_does(path):
    frames, depth, c2w, _, _ = (x[2:-2] for x in shot(path, PATHS.index(path)))
    assert moving_mask(frames, depth, c2w, K).mean() < 0.002


def test_noise_and_depth_that_flickers_as_a_networks_does_move_nothing():
    frames, depth, c2w, _, _ = (x[2:-2] for x in shot("flight", PATHS.index("flight")))
    noise = np.random.default_rng(0).normal(scale=2, size=frames.shape)
    scale = np.exp(np.random.default_rng(1).normal(scale=0.1, size=(len(depth), 1, 1)))
    assert moving_mask((frames + noise).clip(0, 255).astype(np.uint8), depth * scale, c2w, K).mean() < 0.01


@pytest.mark.parametrize("path", PATHS)
def test_what_moves_is_found_whatever_the_camera_does(path):
    frames, depth, c2w, truth, _ = (x[2:-2] for x in shot(path, 1, 0.7))
    found = moving_mask(frames, depth, c2w, K)
    assert overlap(found[2:-2], truth[2:-2]) > 0.92
    assert (found & ~truth).sum() < 0.02 * (~truth).sum()


@pytest.mark.parametrize("path", ["truck", "flight"])
def test_a_small_thing_is_found(path):
    """A thirtieth of the picture and less."""
    frames, depth, c2w, truth, _ = (x[2:-2] for x in shot(path, 0, 0.25))
    found = moving_mask(frames, depth, c2w, K)
    assert truth.mean() < 0.04 and overlap(found[2:-2], truth[2:-2]) > 0.75
    assert (found & ~truth).sum() < 0.01 * (~truth).sum()


def test_a_room_without_texture_does_not_move_along():
    frames, depth, c2w, truth, _ = (x[2:-2] for x in shot("static", 0, 0.4, 0.0))
    found = moving_mask(frames, depth, c2w, K)
    assert overlap(found[2:-2], truth[2:-2]) > 0.8


def test_nothing_is_told_where_no_depth_is_known():
    frames, depth, c2w, truth, _ = (x[2:-2] for x in shot("static", 1, 0.7))
    hole = depth.copy()
    hole[:, :, 80:] = np.nan
    found = moving_mask(frames, hole, c2w, K)
    assert not found[:, :, 84:].any() and overlap(found[4, :, :76], truth[4, :, :76]) > 0.75


@pytest.mark.parametrize(("path", "seed"), [("static", 0), ("flight", 0), ("pan", 1), ("flight", 1)])
def test_a_thing_goes_on_as_it_went(path, seed):
    """From frames 0 to 6 to frame 12, three eighths of a second on: about half of the thing's own width."""
    frames, depth, c2w, truth, where = shot(path, seed, 0.4)
    past = slice(0, 7)
    mask = moving_mask(frames[past], depth[past], c2w[past], K)[-1]
    (thing, *_) = own_motion(frames[past], depth[past], c2w[past], K, mask)
    velocity = where[7] - where[6]
    assert np.linalg.norm(thing.velocity - velocity) < 0.15 * np.linalg.norm(velocity)
    one = keyframe(frames, depth, c2w, 6)
    to, k = torch.from_numpy(c2w[-1:]), torch.from_numpy(K[None])
    carried, still = carry(one, [thing], to, k, [6]), warp(one, to, k)
    true = torch.from_numpy(frames[-1]).permute(2, 0, 1) / 255

    def wrong(found):
        return ((found.images[0] - true).abs().amax(0) > 16 / 255)[found.visible[0]].float().mean()

    assert wrong(carried) < 0.4 * wrong(still)
    # Its middle, in pixels of the last frame, 160 wide: it went 10 to 30.
    local = (np.stack([where[6] + 6 * thing.velocity, where[12]]) - c2w[-1, :3, 3]) @ c2w[-1, :3, :3]
    guess, true_place = (local[:, :2] / local[:, 2:] * K[:2] + K[2:]) * SIZE[::-1]
    assert np.linalg.norm(guess - true_place) < 3


def test_carrying_nothing_is_the_warp_and_a_known_way_is_exact():
    frames, depth, c2w, truth, where = shot("truck", 1, 0.4)
    one, to, k = keyframe(frames, depth, c2w, 6), torch.from_numpy(c2w[7:]), torch.from_numpy(K).expand(6, 4)
    for mine, its in zip(vars(carry(one, [], to, k, range(6))).values(), vars(warp(one, to, k)).values()):
        assert torch.equal(mine, its)
    carried = carry(one, [Moving(truth[6], where[7] - where[6])], to, k, range(1, 7))
    both = carried.visible.numpy()
    error = np.abs(carried.depth.numpy() / depth[7:] - 1)[both]
    assert (error < 0.01).mean() > 0.98
    # Where the thing stood the first keyframe knows nothing, and another one's number is its own.
    whole = Moving(np.ones(SIZE, bool), np.full(3, 1e3))
    two = Keyframes(*(torch.cat([x, x]) for x in (one.images, one.depth, one.intrinsics, one.c2w)))
    assert set(carry(two, [whole], to, k, range(1, 7)).keyframe.unique().tolist()) <= {-1, 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"frames_FHW3": np.zeros((2, 8, 8, 3), np.uint8)}, "F >= 3"),
        ({"frames_FHW3": np.zeros((4, 8, 8, 3), np.float32)}, "float32"),
        ({"depth_FHW": np.ones((4, 4, 4))}, r"depth \(4, 8, 8\)"),
        ({"c2w_F44": np.full((4, 4, 4), np.nan)}, "not registered"),
        ({"intrinsics": K[:3]}, r"intrinsics \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(change, told):
    good = {"frames_FHW3": np.zeros((4, 8, 8, 3), np.uint8), "depth_FHW": np.ones((4, 8, 8)),
            "c2w_F44": np.tile(np.eye(4), (4, 1, 1)), "intrinsics": K}  # fmt: skip
    with pytest.raises(ValueError, match=told):
        moving_mask(**(good | change))


def test_masks_and_times_that_do_not_fit_are_refused():
    frames, depth, c2w, truth, _ = shot("static", 1, 0.4)
    with pytest.raises(ValueError, match="the last frame"):
        own_motion(frames, depth, c2w, K, truth)
    one, to, k = keyframe(frames, depth, c2w, 6), torch.from_numpy(c2w[7:]), torch.from_numpy(K).expand(6, 4)
    with pytest.raises(ValueError, match="6 targets"):
        carry(one, [], to, k, [1, 2])
