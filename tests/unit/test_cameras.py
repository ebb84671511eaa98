import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

from vgr.geometry import cameras as cam
from vgr.types import Cameras


def vectors(angles, count=20, seed=0):
    axis = np.random.default_rng(seed).normal(size=(count, 3))
    return np.concatenate([a * axis / np.linalg.norm(axis, axis=1, keepdims=True) for a in angles])


def random_poses(count, seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :3, :3] = Rotation.random(count, random_state=seed).as_matrix()
    pose[:, :3, 3] = rng.normal(size=(count, 3))
    return torch.tensor(pose, dtype=dtype)


ANGLES = (0.0, 1e-9, 1e-6, 1e-4, 1e-2, 0.3, 0.499, 0.501, 1.0, 3.0, math.pi - 1e-3, math.pi - 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_exp_and_log_of_rotations_against_scipy(dtype, tolerance):
    w = vectors(ANGLES)
    R = Rotation.from_rotvec(w).as_matrix()
    np.testing.assert_allclose(cam.so3_exp(torch.tensor(w, dtype=dtype)), R, atol=tolerance)
    back = cam.so3_log(torch.tensor(R, dtype=dtype)).numpy()
    # Next to pi the axis may flip: compare rotations there, vectors elsewhere.
    near_pi = np.linalg.norm(w, axis=1) > 3.1
    np.testing.assert_allclose(back[~near_pi], w[~near_pi], atol=4 * tolerance)
    np.testing.assert_allclose(Rotation.from_rotvec(back).as_matrix(), R, atol=4 * tolerance)
    assert (np.linalg.norm(back, axis=1) <= math.pi + 1e-6).all()


def test_small_angles_keep_their_relative_precision_in_float32():
    w = vectors((1e-5, 1e-4), count=50)
    back = cam.so3_log(cam.so3_exp(torch.tensor(w, dtype=torch.float32))).double().numpy()
    np.testing.assert_allclose(back, w, atol=1e-5 * 1e-4)


def test_log_at_exactly_pi():
    for axis in np.eye(3):
        R = torch.tensor(Rotation.from_rotvec(math.pi * axis).as_matrix())
        np.testing.assert_allclose(np.abs(cam.so3_log(R).numpy()), math.pi * axis, atol=1e-12)


def test_se3_exp_is_the_matrix_exponential_and_log_its_inverse():
    from scipy.linalg import expm

    xi = np.concatenate([vectors(ANGLES, 5), np.random.default_rng(1).normal(size=(5 * len(ANGLES), 3))], axis=1)
    for row, pose in zip(xi, cam.se3_exp(torch.tensor(xi)).numpy(), strict=True):
        twist = np.zeros((4, 4))
        twist[:3, :3] = np.cross(row[:3], np.eye(3)).T  # columns w x e_j
        twist[:3, 3] = row[3:]
        np.testing.assert_allclose(pose, expm(twist), atol=1e-12)
    away = np.linalg.norm(xi[:, :3], axis=1) < 3.1
    np.testing.assert_allclose(cam.se3_log(cam.se3_exp(torch.tensor(xi)))[away], xi[away], atol=1e-10)


def test_gradients_are_right_and_finite_at_the_identity():
    for angle in (0.0, 1e-3, 0.49, 0.6, 2.5):
        w = torch.tensor(vectors((angle,), 2, seed=3), requires_grad=True)
        assert torch.autograd.gradcheck(cam.so3_exp, (w,))
        assert torch.autograd.gradcheck(lambda v: cam.so3_log(cam.so3_exp(v)), (w,))
    xi = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cam.se3_log(cam.se3_exp(x)), (xi,))


def test_invert_and_relative_agree_with_matrix_inverse_and_batch():
    poses = random_poses(12).reshape(2, 6, 4, 4)
    torch.testing.assert_close(cam.invert(poses), torch.linalg.inv(poses))
    relative = cam.relative_to_first(poses)
    torch.testing.assert_close(relative, torch.linalg.inv(poses[:, :1]) @ poses)
    torch.testing.assert_close(relative[:, 0], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    torch.testing.assert_close(cam.relative_to(poses[0], poses[1]), torch.linalg.inv(poses[1]) @ poses[0])


def test_interpolation_against_scipy_slerp():
    poses, times = random_poses(5), torch.tensor([0.0, 1.0, 1.5, 4.0, 5.0])
    new = torch.tensor([0.0, 0.25, 1.0, 1.4, 3.9, 5.0])
    got = cam.interpolate(poses, times, new)
    slerp = Slerp(times.numpy(), Rotation.from_matrix(poses[:, :3, :3].numpy()))
    np.testing.assert_allclose(got[:, :3, :3], slerp(new.numpy()).as_matrix(), atol=1e-7)
    for axis in range(3):
        np.testing.assert_allclose(got[:, axis, 3], np.interp(new, times, poses[:, axis, 3]), atol=1e-7)
    batched = cam.interpolate(torch.stack([poses, poses.flip(0)]), times, new)
    torch.testing.assert_close(batched[0], got)
    with pytest.raises(ValueError, match="not extrapolated"):
        cam.interpolate(poses, times, torch.tensor([5.1]))
    with pytest.raises(ValueError, match="strictly increasing"):
        cam.interpolate(poses, times.flip(0), new)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_projection_undoes_rays(dtype, tolerance):
    height, width = 6, 9
    c2w = random_poses(3, dtype=dtype)
    k = torch.tensor([[0.9, 1.2, 0.5, 0.5], [0.5, 0.8, 0.45, 0.6], [2.0, 2.5, 0.1, 0.9]], dtype=dtype)
    origins, directions = cam.rays(c2w, k, height, width)
    assert origins.shape == directions.shape == (3, height, width, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3, height, width, dtype=dtype))
    points = (origins + 2.5 * directions).reshape(3, -1, 3)
    xy, depth = cam.project(points, c2w, k)
    want = torch.stack(
        [
            ((torch.arange(width, dtype=dtype) + 0.5) / width).expand(height, width),
            ((torch.arange(height, dtype=dtype) + 0.5) / height)[:, None].expand(height, width),
        ],
        dim=-1,
    ).reshape(-1, 2)
    torch.testing.assert_close(xy, want.expand(3, -1, 2), atol=tolerance, rtol=0)
    assert (depth > 0).all() and (depth <= 2.5 + 1e-5).all()


def test_pixel_centre_and_axes():
    """A 2x2 camera at the origin: the top left pixel looks left (-x) and up (-y)."""
    k = cam.from_fov(90.0, 1.0, torch.float64)
    _, d = cam.rays(torch.eye(4, dtype=torch.float64), k, 2, 2)
    want = torch.tensor([-0.5, -0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(d[0, 0], want / want.norm())


def test_pluecker_is_direction_and_moment_of_the_same_line():
    c2w, k = random_poses(2), torch.tensor([0.9, 1.2, 0.5, 0.5], dtype=torch.float64)
    image = cam.pluecker(c2w, k, 4, 5)
    assert image.shape == (2, 6, 4, 5)
    origins, d = cam.rays(c2w, k, 4, 5)
    np.testing.assert_allclose(image[:, :3].permute(0, 2, 3, 1), d)
    np.testing.assert_allclose(image[:, 3:].permute(0, 2, 3, 1), np.cross(origins, d), atol=1e-12)
    # The moment does not care which point of the line is taken.
    other = np.cross((origins + 7.0 * d).numpy(), d.numpy())
    np.testing.assert_allclose(image[:, 3:].permute(0, 2, 3, 1), other, atol=1e-12)


def test_crop_and_resize_move_a_pixel_as_the_image_does():
    """The pixel at (x, y) of a 100x60 image lands at (x - left, y - top) of the crop, times the resize."""
    c2w, k = random_poses(1)[0], torch.tensor([0.8, 1.3, 0.52, 0.47], dtype=torch.float64)
    point = c2w[:3, 3] + c2w[:3, :3] @ torch.tensor([0.1, -0.2, 2.0], dtype=torch.float64)
    full = cam.project(point[None], c2w, k)[0][0] * torch.tensor([100.0, 60.0])
    top, left, height, width = 7, 20, 40, 64
    cropped = cam.crop_intrinsics(k, (60, 100), (top, left, height, width))
    for factor in (1, 3):
        got = cam.project(point[None], c2w, cropped)[0][0] * torch.tensor([width * factor, height * factor])
        torch.testing.assert_close(got, (full - torch.tensor([left, top])) * factor)
    matrix = cam.intrinsics_matrix(cropped, width, height)
    local = torch.tensor([0.1, -0.2, 2.0], dtype=torch.float64)
    torch.testing.assert_close((matrix @ local)[:2] / 2.0, full - torch.tensor([left, top]))
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
