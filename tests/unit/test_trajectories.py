import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vgr.geometry.trajectories import NAMES, named_cameras

FRAMES, FPS = 49, 16.0


def project(points_FP3, c2w_F44, k_F4):
    """World points to normalised image coordinates (F,P,2) and depth (F,P)."""
    local = (points_FP3 - c2w_F44[:, None, :3, 3]) @ c2w_F44[:, :3, :3]
    k_F14 = k_F4[:, None]
    return k_F14[..., :2] * local[..., :2] / local[..., 2:] + k_F14[..., 2:], local[..., 2]


def path(name, **options):
    c2w, k = named_cameras(name, options.pop("frames", FRAMES), options.pop("fps", FPS), **options)
    return c2w.numpy(), k.numpy()


def step_degrees(c2w):
    steps = Rotation.from_matrix(c2w[:-1, :3, :3]).inv() * Rotation.from_matrix(c2w[1:, :3, :3])
    return np.rad2deg(steps.magnitude())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frames", [1, 2, 7, 48, 49])
@pytest.mark.parametrize("ease", [True, False])
def test_every_path_is_rigid_and_starts_at_the_identity(name, frames, ease):
    c2w, k = path(name, frames=frames, ease=ease)
    assert c2w.shape == (frames, 4, 4) and k.shape == (frames, 4)
    assert c2w.dtype == k.dtype == np.float64
    np.testing.assert_allclose(c2w[0], np.eye(4), atol=1e-14)
    R = c2w[:, :3, :3]
    np.testing.assert_allclose(R @ R.swapaxes(1, 2), np.tile(np.eye(3), (frames, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(R), 1.0)
    np.testing.assert_array_equal(c2w[:, 3], np.tile([0.0, 0, 0, 1], (frames, 1)))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("static", "whip")])
def test_ease_starts_and_stops_smoothly(name):
    def speeds(ease):
        c2w, _ = path(name, frames=97, ease=ease)
        return np.linalg.norm(np.diff(c2w[:, :3, 3], axis=0), axis=1) + np.deg2rad(step_degrees(c2w))

    eased, linear = speeds(True), speeds(False)
    assert eased[0] < 0.05 * eased.max() and eased[-1] < 0.05 * eased.max()
    assert linear[0] > 0.05 * linear.max() and linear[-1] > 0.05 * linear.max()


def test_directions_in_opencv_axes():
    end = {name: path(name)[0][-1] for name in NAMES}
    np.testing.assert_allclose(end["dolly"][:3, 3], [0, 0, 2])
    np.testing.assert_allclose(end["truck"][:3, 3], [1.5, 0, 0])
    np.testing.assert_allclose(end["pedestal"][:3, 3], [0, -0.8, 0])
    np.testing.assert_allclose(end["pan"][:3, 2], [math.sin(math.pi / 4), 0, math.cos(math.pi / 4)])
    tilted = end["tilt"][:3, 2]
    assert tilted[1] < 0 and tilted[0] == 0, "a positive tilt looks up, which is -y"
    np.testing.assert_allclose(math.degrees(math.asin(-tilted[1])), 25)
    rolled = end["roll"]
    np.testing.assert_allclose(rolled[:3, 2], [0, 0, 1])
    assert rolled[1, 0] > 0, "clockwise: the camera's right side goes down, which is +y"
    np.testing.assert_allclose(math.degrees(math.asin(rolled[1, 0])), 20)
    for name, option in (("dolly", "distance"), ("truck", "distance"), ("pan", "angle_deg"), ("roll", "angle_deg")):
        reverse = path(name, **{option: -1.0})[0][-1]
        forward = path(name, **{option: 1.0})[0][-1]
        np.testing.assert_allclose(reverse, np.linalg.inv(forward), atol=1e-12)


@pytest.mark.parametrize("name", ["palindrome", "closed_loop", "figure_eight"])
@pytest.mark.parametrize("frames", [9, 48, 49, 97])
def test_closing_paths_return_exactly_and_do_leave(name, frames):
    c2w, _ = path(name, frames=frames)
    np.testing.assert_array_equal(c2w[-1], c2w[0])
    assert np.linalg.norm(c2w[:, :3, 3], axis=1).max() > 0.3
    if name == "palindrome":
        np.testing.assert_array_equal(c2w, c2w[::-1])


def test_figure_eight_crosses_itself_and_closed_loop_looks_where_it_walks():
    c2w, _ = path("figure_eight", frames=97)
    np.testing.assert_allclose(c2w[48, :3, 3], 0, atol=1e-12)
    assert c2w[:, 0, 3].min() < -0.5 and c2w[:, 0, 3].max() > 0.5
    c2w, _ = path("closed_loop", frames=401, ease=False)
    step = np.diff(c2w[:, :3, 3], axis=0)
    forward = c2w[:-1, :3, 2]
    assert ((step * forward).sum(1) / np.linalg.norm(step, axis=1)).min() > 0.999


@pytest.mark.parametrize(("options", "degrees"), [({}, 90), ({"angle_deg": -40.0}, 40), ({"turns": 1.0}, 360)])
def test_orbit_keeps_its_target_in_the_centre_at_constant_distance(options, degrees):
    c2w, k = named_cameras("orbit", 181, FPS, distance=1.7, **options)
    target = torch.tensor([[0.0, 0.0, 1.7]], dtype=torch.float64).expand(181, 1, 3)
    xy, depth = project(target, c2w, k)
    torch.testing.assert_close(xy, torch.full_like(xy, 0.5))
    torch.testing.assert_close(depth, torch.full_like(depth, 1.7))
    assert step_degrees(c2w.numpy()).sum() == pytest.approx(degrees)
    side = c2w[20, 0, 3].item()
    assert (side > 0) == (options.get("angle_deg", 1) > 0)


@pytest.mark.parametrize("name", ["spiral", "figure_eight"])
def test_paths_that_look_at_a_target_do(name):
    c2w, k = named_cameras(name, FRAMES, FPS)
    xy, depth = project(torch.tensor([[[0.0, 0.0, 2.0]]], dtype=torch.float64).expand(FRAMES, 1, 3), c2w, k)
    torch.testing.assert_close(xy, torch.full_like(xy, 0.5))
    assert (depth > 0.5).all()


@pytest.mark.parametrize("angle", [90.0, -30.0, 10.0])
@pytest.mark.parametrize(("frames", "fps"), [(97, 16.0), (33, 8.0), (600, 60.0)])
def test_whip_reaches_sixty_degrees_a_second(angle, frames, fps):
    c2w, _ = path("whip", frames=frames, fps=fps, angle_deg=angle)
    steps = step_degrees(c2w)
    assert steps.max() * fps >= 60
    assert steps.sum() == pytest.approx(abs(angle))
    assert steps[0] == steps[-1] == 0, "it holds still before and after"
    yaw = Rotation.from_matrix(c2w[-1, :3, :3]).as_rotvec()[1]
    assert math.degrees(yaw) == pytest.approx(angle)


def test_dolly_zoom_keeps_the_subjects_size_and_changes_the_background():
    k0 = torch.tensor([0.8, 1.1, 0.5, 0.5], dtype=torch.float64)
    c2w, k = named_cameras("dolly_zoom", FRAMES, FPS, intrinsics=k0, distance=3.0)
    subject = torch.tensor([[-0.5, -0.4, 3.0], [0.5, 0.4, 3.0]], dtype=torch.float64).expand(FRAMES, 2, 3)
    xy, _ = project(subject, c2w, k)
    torch.testing.assert_close(xy, xy[:1].expand_as(xy))
    far, _ = project(subject * 3, c2w, k)
    assert (far[-1, 1] - far[-1, 0])[0] < 0.8 * (far[0, 1] - far[0, 0])[0]
    assert c2w[-1, 2, 3] > 1.0
    torch.testing.assert_close(k[0], k0)


def test_intrinsics_are_kept_by_all_other_paths():
    k = torch.rand(FRAMES, 4) + 0.2
    for name in set(NAMES) - {"dolly_zoom"}:
        torch.testing.assert_close(named_cameras(name, FRAMES, FPS, intrinsics=k)[1], k.double())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("orbitt", 9, 16.0), {}, r"orbitt.*did you mean 'orbit'.*figure_eight"),
        (("zzz", 9, 16.0), {}, "Known: static"),
        (("dolly", 9, 16.0), {"angle_deg": 3.0}, "dolly.*does not take angle_deg.*distance"),
        (("orbit", 9, 16.0), {"angle_deg": 3.0, "turns": 1.0}, "not both"),
        (("orbit", 9, 16.0), {"distance": -1.0}, "must be > 0"),
        (("dolly", 9, 16.0), {"distance": math.nan}, "finite"),
        (("closed_loop", 9, 16.0), {"turns": 1.5}, "whole"),
        (("dolly", 0, 16.0), {}, "frames"),
        (("dolly", 9, 0.0), {}, "fps"),
        (("dolly", 9, 16.0), {"intrinsics": torch.ones(3, 4)}, "intrinsics"),
    ],
)
def test_bad_input_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        named_cameras(*arguments, **options)
