import cv2
import numpy as np
import pytest

from vgr.data import doom
from vgr.data.doom_paths import DEPTH_STEP, MOODS, Free, Walker, free_space, start_heading

SMALL = (48, 64)


def test_camera_axes():
    east, north = doom.camera_to_world(64, 32, 16, 0), doom.camera_to_world(64, 32, 16, 90)
    np.testing.assert_allclose(east[:3, 3], (2, -0.5, 1))  # east, down, north in metres
    np.testing.assert_allclose(east[:3, 2], (1, 0, 0), atol=1e-12)  # looks east
    np.testing.assert_allclose(east[:3, 0], (0, 0, -1), atol=1e-12)  # south is to the right
    np.testing.assert_allclose(north[:3, 2], (0, 0, 1), atol=1e-12)
    np.testing.assert_allclose(north[:3, 0], (1, 0, 0), atol=1e-12)
    for pose in (east, north):
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
        assert np.isclose(np.linalg.det(pose[:3, :3]), 1)


def pixel_rays(height, width, k=(0.5, 0.8, 0.5, 0.5)):
    u = ((np.arange(width) + 0.5) / width - k[2]) / k[0]
    v = ((np.arange(height) + 0.5) / height - k[3]) / k[1]
    return np.stack([*np.meshgrid(u, v), np.ones((height, width))], axis=-1)


def warp(image, points_world, c2w, k=(0.5, 0.8, 0.5, 0.5)):
    """The image sampled where a camera at c2w sees points (H,W,3), and where that lies inside it."""
    local = (points_world - c2w[:3, 3]) @ c2w[:3, :3]
    z = np.maximum(local[..., 2], 1e-6)
    height, width = image.shape
    x = (local[..., 0] / z * k[0] + k[2]) * width - 0.5
    y = (local[..., 1] / z * k[1] + k[3]) * height - 0.5
    inside = (local[..., 2] > 0.1) & (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    return cv2.remap(image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR), inside


@pytest.fixture(scope="module")
def turning():
    """Views while turning on the spot by uneven steps: (grey images, poses)."""
    rng = np.random.default_rng(0)
    with doom.Engine("freedoom2/MAP01", (96, 128)) as engine:
        engine.restart(3)
        states = [engine.act(turn_deg=float(rng.uniform(-9, 9))) for _ in range(16)]
        return [s.screen_buffer.mean(-1).astype(np.float32) for s in states], [
            doom.camera_to_world(*s.game_variables[:4]) for s in states
        ]


def test_a_frame_is_rendered_at_its_own_pose(turning):
    images, poses = turning
    rays = pixel_rays(*images[0].shape)

    def error(offset):
        errors = []
        for i in range(3, 12):
            # Turning on the spot moves no parallax: any distance does, here a kilometre.
            there = poses[i + offset][:3, 3] + 1000 * rays @ poses[i + offset][:3, :3].T
            moved, inside = warp(images[i + 1], there, poses[i + 1 + offset])
            errors.append(np.abs(moved - images[i])[inside].mean())
        return np.mean(errors)

    right = error(0)
    assert all(error(offset) > 2 * right for offset in (-2, -1, 1, 2))


def test_walking_agrees_with_depth_metres_and_focal_lengths():
    with doom.Engine("freedoom2/MAP01", (96, 128)) as engine:
        engine.restart(3)
        engine.game.send_game_command("notarget")
        engine.act(turn_deg=60.0)
        states = [engine.act(right=6.0) for _ in range(12)]
    images = [s.screen_buffer.mean(-1).astype(np.float32) for s in states]
    poses = [doom.camera_to_world(*s.game_variables[:4]) for s in states]
    depth = doom.metres(states[4].depth_buffer)

    def error(scale=1.0, k=(0.5, 0.8, 0.5, 0.5)):
        there = poses[4][:3, 3] + depth[..., None] * pixel_rays(*depth.shape, k) @ poses[4][:3, :3].T
        target = poses[10].copy()
        target[:3, 3] = poses[4][:3, 3] + scale * (poses[10][:3, 3] - poses[4][:3, 3])
        moved, inside = warp(images[10], there, target, k)
        trusted = inside & (depth > 2.0) & (depth < 30.0)  # depth steps are coarse near, and it ends far off
        return np.abs(moved - images[4])[trusted].mean()

    assert np.linalg.norm(poses[10][:3, 3] - poses[4][:3, 3]) > 0.4
    right = error()
    assert right < error(scale=0.5) and right < error(scale=1.5) and right < error(scale=-1.0)


def test_a_wall_meets_the_floor_where_the_vertical_focal_length_puts_it():
    with doom.Engine("freedoom1/E1M1", (384, 512)) as engine:
        engine.restart(3)
        state = engine.act(turn_deg=180.0)  # looks straight at a wall
        for _ in range(60):
            touching = engine.act(forward=4.0)
    # The player's body is 16 units round and the eyes are 41 above the floor.
    distance = state.game_variables[0] - (touching.game_variables[0] - 16)
    column = state.depth_buffer[:, 512].astype(int)
    below = np.flatnonzero(np.diff(column[400:]))[0] + 401  # first row of the floor, where depth changes
    assert (below / len(column) - 0.5) * distance / 41 == pytest.approx(0.8, abs=0.005)


@pytest.fixture(scope="module")
def source():
    return doom.DoomSource(17, SMALL, skip=2, depth=True, clips_per_visit=2)


@pytest.fixture(scope="module")
def visits(source):
    return [source.capture(5, "train", v) for v in (0, 1)]


def equal(a, b):
    return (a.frames == b.frames).all() and (a.c2w == b.c2w).all() and a.shots == b.shots and (a.depth == b.depth).all()


def test_replays_are_equal_in_any_order(source, visits):
    again = [source.capture(5, "train", v) for v in (1, 0)][::-1]
    assert all(equal(a, b) for old, new in zip(visits, again, strict=True) for a, b in zip(old, new, strict=True))
    other = source.capture(6, "train", 0)
    assert not equal(visits[0][0], other[0])


def test_clips_have_the_stated_form(visits):
    for clip in [c for visit in visits for c in visit]:
        assert clip.frames.shape == (17, *SMALL, 3) and clip.frames.dtype == np.uint8
        assert clip.c2w.shape == (17, 4, 4) and clip.fps == 17.5 and clip.depth.shape == (17, *SMALL)
        np.testing.assert_allclose(clip.intrinsics, np.tile((0.5, 0.8, 0.5, 0.5), (17, 1)))
        assert np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1).max() < 1.6  # no teleports
        (shot,) = clip.shots
        assert shot["start"] == 0 and shot["end"] == 17 and "freedoom" in shot["caption"]
        assert clip.source["map"] in doom.TRAIN_MAPS
        assert clip.frames.std() > 8


def test_pickups_of_the_file_are_those_the_engine_knows():
    engine = doom.Engine("freedoom2/MAP07", SMALL)
    engine.game.set_objects_info_enabled(True)
    with engine:
        objects = engine.restart(1).objects
    kinds = ("Ammo", "Health", "Armor", "Weapon", "Powerup", "Key")
    known = {(round(o.position_x), round(o.position_y)) for o in objects if o.category in kinds}
    assert known == set(map(tuple, engine.places.tolist())) and len(known) > 50


def test_pace_slows_the_path_and_not_the_clock():
    def covered(pace):
        clips = doom.DoomSource(17, SMALL, pace=pace, clips_per_visit=2).capture(5, "train", 0)
        assert all(clip.fps == 17.5 for clip in clips)
        return max(np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1).max() for clip in clips)

    assert 0 < covered(0.2) < 2 * 0.2 * 7.0 / doom.UNITS_PER_METRE * 1.1  # two tics at the fastest walk
    with pytest.raises(ValueError, match="source.pace"):
        doom.DoomSource(17, SMALL, pace=0)


def test_maps_are_held_out_whole(source):
    assert not set(doom.TRAIN_MAPS) & set(doom.VAL_MAPS)
    assert len(doom.TRAIN_MAPS) == 54 and len(doom.VAL_MAPS) == 10
    assert all(clip.source["map"] in doom.VAL_MAPS for clip in source.capture(5, "val", 0))


def test_sizes_that_would_not_be_exact_are_refused():
    for size in ((64, 64), (45, 60), (960, 1280)):
        with pytest.raises(ValueError, match="size_hw"):
            doom.DoomSource(17, size)
    with pytest.raises(ValueError, match="skip"):
        doom.DoomSource(17, SMALL, skip=0)


def test_free_space_reads_walls_where_they_are():
    depth = np.full((96, 128), 100, np.uint8)
    depth[:, :32] = 10  # a wall on the left
    free = free_space(depth)
    assert free.left < 0.4 * free.right and free.ahead == free.right == pytest.approx(100 * DEPTH_STEP)
    depth[:, 60:68] = 5  # a pillar in front
    assert free_space(depth).ahead == pytest.approx(5 * DEPTH_STEP)


def test_walker_turns_to_the_open_side_and_slows_before_walls():
    for side, free in ((1, Free(90, 600, 100, 200)), (-1, Free(90, 100, 600, 200))):
        walker = Walker(np.random.default_rng(1), "straight", 1, 2 / 35)
        path = [walker.step(free, 5.0) for _ in range(20)]
        assert side * path[-1][2] > 30 and path[-1][0] < 0.5 * walker.speed


def test_walker_is_smooth_in_every_mood():
    far = Free(1500, 900, 900, 900)
    for i, mood in enumerate(MOODS):
        walker = Walker(np.random.default_rng(i), mood, 1, 2 / 35)
        path = np.array([walker.step(far, 5.0) for _ in range(200)])
        assert np.abs(np.diff(path[:, :2], axis=0)).max() < 2.5 and np.abs(np.diff(path[:, 2])).max() < 25
        still = np.abs(path[:20]).max(axis=0)
        assert {"stand": still.max() == 0, "look": still[:2].max() == 0 < still[2]}.get(mood, still.max() > 0)


def test_start_heading_suits_the_mood():
    ahead = np.array([500.0, 60, 60, 60, 60, 60, 60, 60])
    rng = np.random.default_rng(0)
    assert start_heading(ahead, "walk", 1, rng) == 0
    assert start_heading(ahead, "backward", 1, rng) == 4  # the way is free behind
    assert start_heading(np.array([400.0, 60, 400, 60, 60, 60, 60, 60]), "strafe", 1, rng) == 0  # free on the left
