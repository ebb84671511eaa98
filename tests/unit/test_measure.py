"""Cameras of measured videos by structure from motion, on exact renders of a room."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from tests.unit.test_camera_pose import intrinsics, render, walk
from vgr.geometry import reconstruct
from vgr.metrics.pose_conventions import KEYS
from vgr.report.measure import Job, Video, _structure
from vgr.report.rows import _chunk_starts
from vgr.report.sets import VideoSet

FRAMES, FPS, W, H = 17, 8.0, 320, 240
POSE = {"frames": 9, "per_s": 4, "least_height": 240, "long_side": 320}


@pytest.fixture(scope="module")
def room():
    pytest.importorskip("pycolmap")
    path = walk(1, FRAMES)
    return render(path, W, H, over=1), (path, np.tile(intrinsics(W, H), (FRAMES, 1)))


def structure(video, paths, cuts=(), folder=Path("nowhere"), **settings):
    job = Job({"pose": {**POSE, **settings}}, FRAMES, {}, {}, None, (0, 1), lambda n: None)
    seen = Video("a", {}, lambda: video, len(video), FPS, list(cuts))
    return _structure(job, VideoSet(folder, ("a",), {}), seen, paths)


def test_cameras_that_another_estimator_found_take_the_place_of_ours(room, tmp_path, monkeypatch):
    video, (c2w, k) = room
    monkeypatch.setattr(reconstruct, "reconstruct", lambda *args: pytest.fail("ours was asked"))
    other = c2w.copy()
    other[:, :3, :3] = other[:, :3, :3] @ Rotation.from_euler("y", [[0.0]] + [[3.0]] * (FRAMES - 1), True).as_matrix()
    other[4] = np.nan
    np.savez(tmp_path / "a.poses.npz", c2w=other)
    values, every = structure(video, [(c2w, k)], folder=tmp_path)
    assert values["sfm_given"] == 1 and values["sfm_coverage"] == 8 / 9 and "sfm_fov_deg" not in values
    assert 0.1 < values["rot_imputed_deg"] < 3.1 and np.isfinite(every).all()
    np.savez(tmp_path / "a.poses.npz", c2w=other[:5])
    with pytest.raises(ValueError, match=r"a.poses.npz: c2w has the shape \(5, 4, 4\); \(17, 4, 4\) is needed"):
        structure(video, [(c2w, k)], folder=tmp_path)


def test_true_video_gives_the_noise_floor_and_every_convention(room):
    video, path = room
    values, every = structure(video, [path])
    assert values["sfm_coverage"] == 1 and values["sfm_fov_deg"] == pytest.approx(90)
    assert values["rot_imputed_deg"] < 0.3 and values["path_length_ratio"] > 0
    length = np.linalg.norm(np.diff(path[0][:, :3, 3], axis=0), axis=1).sum()
    assert values["trans_imputed"] < 0.02 * length
    assert {f"{name}_{key}" for name, keys in KEYS.items() for key in keys} <= set(values)
    assert values["sana-wm_rot_mean_deg"] == pytest.approx(values["rot_imputed_deg"], abs=0.05)
    assert values["worldscore_score_rot"] > 97
    assert np.isfinite(every).all()  # keyframes are two frames apart, and the frames between them have cameras too
    turned = np.linalg.inv(path[0][0]) @ path[0]
    assert np.abs((np.linalg.inv(every[0]) @ every)[:, :3, :3] - turned[:, :3, :3]).max() < 0.02


def test_a_frozen_video_makes_the_commanded_path_its_error(room):
    video, path = room
    values, _ = structure(np.repeat(video[:1], FRAMES, axis=0), [path])
    at = path[0][:: int(FPS / POSE["per_s"])]
    relative = np.linalg.inv(at[0]) @ at
    angle = np.degrees(np.arccos(np.clip((np.trace(relative[:, :3, :3], axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert values["rot_imputed_deg"] > 0.5 * angle.mean() - 1 and values.get("path_length_ratio", 0) < 0.05


def test_small_short_and_mismatched_videos(room):
    video, path = room
    assert structure(video, [path], least_height=241) == ({}, None)
    assert structure(video[:3], [path], per_s=2) == ({}, None)  # two keyframes
    with pytest.raises(ValueError, match="a.mp4 has 17 frames and 9 cameras; give one a frame"):
        structure(video, [tuple(x[:9] for x in path)])


def test_chunks_start_where_the_model_makes_them():
    class Streaming:
        stride, chunk, codec = 4, 3, SimpleNamespace(clip=None)

    # 13 latent frames in chunks of 3 + 1, 3, 3, 3: raw frames 1 + 4 (k - 1) of latent frame k.
    starts = _chunk_starts(Streaming(), 49)
    assert all((s - 1) % 4 == 0 for s in starts) and starts == sorted(starts) and starts[-1] < 49
    assert np.diff(starts).tolist() == [12] * (len(starts) - 1) and len(starts) in (3, 4)
    Streaming.chunk, Streaming.codec = 3, SimpleNamespace(clip=3)  # clips of nine raw frames
    assert _chunk_starts(Streaming(), 25) == [9, 18]
    Streaming.chunk = None
    assert _chunk_starts(Streaming(), 49) == []
