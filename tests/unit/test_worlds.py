import cv2
import numpy as np

from vgr.data.worlds import Scene, WorldSource, free_flight

SIZE = (48, 64)
K = np.array([0.6, 0.8, 0.5, 0.5])


def rays(c2w, k, height, width):
    u = ((np.arange(width) + 0.5) / width - k[2]) / k[0]
    v = ((np.arange(height) + 0.5) / height - k[3]) / k[1]
    local = np.stack([*np.meshgrid(u, v), np.ones((height, width))], axis=-1)
    return local @ c2w[:3, :3].T


def flight(seed, frames=20):
    scene = Scene(np.random.default_rng(seed))
    return scene, free_flight(np.random.default_rng(seed + 100), scene, frames, 8.0)


def test_depth_ends_on_a_surface_of_the_scene():
    for seed in range(4):
        scene, poses = flight(seed)
        time_s = 0.7
        points = poses[5, :3, 3] + scene.depth(poses[5], K, time_s, SIZE)[..., None] * rays(poses[5], K, *SIZE)
        distance = np.abs(np.abs(points - scene.centre) / scene.half - 1).min(axis=-1)  # to the walls
        assert (np.abs(points - scene.centre) <= scene.half * (1 + 1e-5)).all()
        for thing in scene.things:
            away = (points - thing.at(time_s)) / thing.half
            size = np.linalg.norm(away, axis=-1) if thing.shape == "sphere" else np.abs(away).max(axis=-1)
            assert (size > 1 - 1e-4).all()  # nothing is looked through
            distance = np.minimum(distance, np.abs(size - 1))
        assert distance.max() < 1e-4


def test_another_view_of_the_same_moment_agrees_through_depth():
    scene, poses = flight(2)
    source, target = poses[0], poses[4]
    image, depth = scene.render(source, K, 0.3, SIZE), scene.depth(source, K, 0.3, SIZE)
    points = source[:3, 3] + depth[..., None] * rays(source, K, *SIZE)
    seen = scene.depth(target, K, 0.3, SIZE)

    def error(c2w):
        local = (points - c2w[:3, 3]) @ c2w[:3, :3]
        z = local[..., 2]
        x, y = ((local[..., i] / z * K[i] + K[i + 2]) * SIZE[1 - i] - 0.5 for i in (0, 1))
        x, y = x.astype(np.float32), y.astype(np.float32)
        nearest = cv2.remap(seen, x, y, cv2.INTER_LINEAR, borderValue=-1)
        visible = (np.abs(nearest - z) < 0.03) & (z > 0.1)
        other = cv2.remap(scene.render(target, K, 0.3, SIZE).astype(np.float32), x, y, cv2.INTER_LINEAR)
        return np.abs(other - image)[visible].mean(), visible.mean()

    wrong, right = error(poses[0]), error(target)
    assert right[1] > 0.5 and right[0] < 3
    assert wrong[0] > 2 * right[0] or wrong[1] < 0.5 * right[1]


def test_things_move_and_the_room_does_not():
    scene, poses = flight(1)
    moved = [np.linalg.norm(t.at(1.0) - t.at(0.0)) for t in scene.things]
    assert sum(m > 0.05 for m in moved) == 2 and sum(m == 0 for m in moved) == len(moved) - 2
    source = WorldSource(12, SIZE, depth=True)
    assert any((source.clip(1, "train", i).depth.std(axis=0) > 0.1).any() for i in range(3))


def test_free_flights_stay_clear_of_everything():
    for seed in range(20):
        scene, poses = flight(seed, 100)
        for f in range(0, 100, 10):
            assert (np.abs(poses[f, :3, 3] - scene.centre) < scene.half - 0.3).all()
            assert scene.depth(poses[f], K, f / 8, (6, 8)).min() > 0.1
        rotation = poses[:, :3, :3]
        np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3)[None].repeat(100, 0), atol=1e-12)
        np.testing.assert_allclose(np.linalg.det(rotation), 1)


def test_clips_are_functions_of_seed_split_and_index():
    source = WorldSource(8, (24, 32), clips_per_visit=2)
    again = WorldSource(8, (24, 32), clips_per_visit=2)
    visit = source.capture(3, "train", 1)
    for i, clip in enumerate(visit):
        same = again.clip(3, "train", 2 + i)
        assert (clip.frames == same.frames).all() and (clip.c2w == same.c2w).all() and clip.shots == same.shots
    others = [source.clip(3, "val", 2), source.clip(4, "train", 2), source.clip(3, "train", 3)]
    assert all((visit[0].frames != other.frames).any() for other in others)


def test_cuts_change_room_caption_and_camera_at_the_stated_frame():
    source = WorldSource(16, (24, 32), cut_share=1.0)
    for clip in (source.clip(1, "train", i) for i in range(4)):
        (first, second), jumps = clip.shots, np.abs(np.diff(clip.frames.astype(float), axis=0)).mean((1, 2, 3))
        assert first["start"] == 0 and first["end"] == second["start"] and second["end"] == 16
        assert first["caption"] != second["caption"]
        assert jumps.argmax() == second["start"] - 1
    assert len(WorldSource(16, (24, 32), cut_share=0.0).clip(1, "train", 0).shots) == 1
