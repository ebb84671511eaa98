"""Cameras by direct alignment with a first frame of known depth: exact worlds, blurred ones, and paths not followed."""

import cv2
import numpy as np
import pytest
from test_moving import K, shot

from benchmarks.alignment import pose_errors, track

SIZE = 0.3  # half the side of what moves, metres


def clip(path, size=0.0):
    frames, depth, c2w, mask, _ = shot(path, 3, size)
    return frames, depth[0], np.linalg.inv(c2w[0]) @ c2w, mask[0]


@pytest.mark.parametrize("path", ["dolly", "truck", "pan", "flight"])
def test_the_camera_of_a_true_video_is_found(path):
    frames, depth, c2w, _ = clip(path)
    found = pose_errors(track(frames, depth, K), c2w)
    still = pose_errors(np.tile(np.eye(4), (len(c2w), 1, 1)), c2w)
    assert found["align_rot_deg"] < 0.5 and found["align_trans_m"] < 0.03
    assert max(still["align_rot_deg"] / 0.5, still["align_trans_m"] / 0.03) > 4


def test_light_that_changes_is_no_motion():
    frames, depth, c2w, _ = clip("pan")
    falls = np.linspace(1, 0.6, len(frames))[:, None, None, None]
    found = pose_errors(track((frames * falls).astype(np.uint8), depth, K, relit=True), c2w)
    assert found["align_rot_deg"] < 1.0 and found["align_trans_m"] < 0.1


def test_blur_changes_little():
    frames, depth, c2w, _ = clip("flight")
    blurred = np.stack([frames[0], *(cv2.GaussianBlur(frame, (0, 0), 2.5) for frame in frames[1:])])
    found = pose_errors(track(blurred, depth, K), c2w)
    assert found["align_rot_deg"] < 1.0 and found["align_trans_m"] < 0.1


def test_a_path_told_but_not_gone_is_not_found():
    frames, depth, c2w, _ = clip("dolly")
    stays = np.repeat(frames[:1], len(frames), axis=0)
    poses = track(stays, depth, K, told_F44=c2w)
    assert pose_errors(poses, np.tile(np.eye(4), (len(c2w), 1, 1)))["align_trans_m"] < 0.01
    assert pose_errors(poses, c2w)["align_trans_m"] > 0.15


def test_what_moves_is_left_out_by_its_mask():
    frames, depth, c2w, mask = clip("truck", SIZE)
    assert mask.any()
    found = pose_errors(track(frames, depth, K, mask), c2w)
    assert found["align_rot_deg"] < 1.0 and found["align_trans_m"] < 0.06


def test_what_does_not_fit_is_said():
    frames, depth, c2w, _ = clip("dolly")
    with pytest.raises(ValueError, match="depth"):
        track(frames, depth[:-1], K)
    with pytest.raises(ValueError, match="told"):
        track(frames, depth, K, told_F44=c2w[:-1])
    with pytest.raises(ValueError, match="paths"):
        pose_errors(c2w[:-1], c2w)
