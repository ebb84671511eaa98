import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vgr.geometry import cameras as cam
from vgr.types import Cameras

ANGLES = (0.0, 1e-9, 1e-6, 1e-4, 1e-2, 0.3, 0.5, 1.0, 3.0, math.pi - 1e-6, math.pi)


def vectors(angles, count=20, seed=0):
    axis = np.random.default_rng(seed).normal(size=(count, 3))
    return np.concatenate([a * axis / np.linalg.norm(axis, axis=1, keepdims=True) for a in angles])


def random_poses(count, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :3, :3] = Rotation.random(count, random_state=seed).as_matrix()
    pose[:, :3, 3] = rng.normal(size=(count, 3))
    return torch.tensor(pose, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_exp_of_rotations_against_scipy(dtype, tolerance):
    w = vectors(ANGLES)
    got = cam.so3_exp(torch.tensor(w, dtype=dtype))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, Rotation.from_rotvec(w).as_matrix(), atol=tolerance)


def test_small_angles_keep_their_relative_precision_in_float32():
    w = vectors((1e-5, 1e-4), count=50)
    R = cam.so3_exp(torch.tensor(w, dtype=torch.float32)).double().numpy()
    back = np.stack([R[:, 2, 1] - R[:, 1, 2], R[:, 0, 2] - R[:, 2, 0], R[:, 1, 0] - R[:, 0, 1]], axis=1) / 2
    np.testing.assert_allclose(back, w, atol=1e-5 * 1e-4)


def test_gradients_are_right_and_finite_at_the_identity():
    for angle in (0.0, 1e-3, 0.49, 0.6, 2.5):
        w = torch.tensor(vectors((angle,), 2, seed=3), requires_grad=True)
        assert torch.autograd.gradcheck(cam.so3_exp, (w,))


def test_invert_and_relative_agree_with_matrix_inverse_and_batch():
    poses = random_poses(12).reshape(2, 6, 4, 4)
    torch.testing.assert_close(cam.invert(poses), torch.linalg.inv(poses))
    relative = cam.relative_to_first(poses)
    torch.testing.assert_close(relative, torch.linalg.inv(poses[:, :1]) @ poses)
    torch.testing.assert_close(relative[:, 0], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))


def test_interpolation_turns_evenly_and_moves_on_a_line():
    times = torch.tensor([0.0, 2.0, 3.0])
    angles = torch.tensor([0.0, 80.0, 50.0], dtype=torch.float64)
    poses = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    poses[:, :3, :3] = cam.so3_exp(torch.deg2rad(angles)[:, None] * torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64))
    poses[:, 0, 3] = torch.tensor([0.0, 4.0, 5.0])
    new = torch.tensor([0.0, 0.5, 2.0, 2.25, 3.0])
    got = cam.interpolate(poses, times, new)
    turned = cam.turn_deg(got[:, :3, :3])
    torch.testing.assert_close(turned, torch.tensor([0.0, 20.0, 80.0, 72.5, 50.0], dtype=torch.float64))
    torch.testing.assert_close(got[:, 0, 3], torch.tensor([0.0, 1.0, 4.0, 4.25, 5.0], dtype=torch.float64))
    still = cam.interpolate(poses[1:2], times[:1], times[:1])
    torch.testing.assert_close(still, poses[1:2])
    for wrong in ((times, torch.tensor([3.1])), (times.flip(0), new)):
        with pytest.raises(ValueError):
            cam.interpolate(poses, *wrong)


def _pixel(local, k, width, height):
    return torch.stack([(k[0] * local[0] / local[2] + k[2]) * width, (k[1] * local[1] / local[2] + k[3]) * height])


def test_crop_and_resize_move_a_pixel_as_the_image_does():
    """The pixel at (x, y) of a 100x60 image lands at (x - left, y - top) of the crop, times the resize."""
    k, local = torch.tensor([0.8, 1.3, 0.52, 0.47], dtype=torch.float64), torch.tensor([0.1, -0.2, 2.0]).double()
    full = _pixel(local, k, 100, 60)
    top, left, height, width = 7, 20, 40, 64
    cropped = cam.crop_intrinsics(k, (60, 100), (top, left, height, width))
    for factor in (1, 3):
        got = _pixel(local, cropped, width * factor, height * factor)
        torch.testing.assert_close(got, (full - torch.tensor([left, top])) * factor)
    with pytest.raises(ValueError, match="> 0"):
        cam.crop_intrinsics(k, (60, 100), (0, 0, 0, 5))


def test_field_of_view():
    k = cam.from_fov(90.0, 4 / 3, torch.float64)
    np.testing.assert_allclose(k, [0.5, 2 / 3, 0.5, 0.5])
    np.testing.assert_allclose(cam.fov_deg(k), [90.0, 2 * math.degrees(math.atan(0.75))])
    shifted = cam.crop_intrinsics(k, (3, 4), (0, 0, 3, 2))  # the left half sees 45 degrees
    np.testing.assert_allclose(cam.fov_deg(shifted)[0], 45.0)
    with pytest.raises(ValueError, match="hfov_deg"):
        cam.from_fov(180.0, 1.0)


def test_grouping_by_latent_frame():
    stride, frames = 4, 9
    c2w = random_poses(2 * frames).reshape(2, frames, 4, 4)
    k = torch.rand(2, frames, 4, dtype=torch.float64)
    got = cam.group_by_latent(Cameras(c2w, k), stride)
    relative = torch.linalg.inv(c2w[:, :1]) @ c2w
    assert got.raw_c2w.shape == (2, 3, 4, 4, 4)
    torch.testing.assert_close(got.c2w, relative[:, [0, 4, 8]])
    torch.testing.assert_close(got.raw_c2w[:, 0], relative[:, 0:4])
    torch.testing.assert_close(got.raw_c2w[:, 1], relative[:, 1:5])
    torch.testing.assert_close(got.raw_c2w[:, 2], relative[:, 5:9])
    torch.testing.assert_close(got.raw_intrinsics[:, 2], k[:, 5:9])
    one = cam.group_by_latent(Cameras(c2w[:, :1], k[:, :1]), stride)  # a single image: its pose repeated
    torch.testing.assert_close(one.raw_c2w, relative[:, :1, None].expand(2, 1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"8 camera frames .* stride of 4"):
        cam.group_by_latent(Cameras(c2w[:, :8], k[:, :8]), stride)
