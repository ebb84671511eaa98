"""What check_cameras refuses, and what it warns of."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from vgr.geometry.cameras import from_fov
from vgr.geometry.checks import check_cameras
from vgr.types import Cameras

SIZE = (120, 160)


def cameras(frames=9, batch=1, hfov=60.0):
    k = from_fov(hfov, SIZE[1] / SIZE[0], torch.float64)
    return Cameras(torch.eye(4, dtype=torch.float64).repeat(batch, frames, 1, 1), k.repeat(batch, frames, 1))


def test_a_still_square_camera_passes_in_both_precisions():
    still = cameras(batch=2)
    assert check_cameras(still, 16, SIZE, 8) == []
    assert check_cameras(Cameras(still.c2w.float(), still.intrinsics.float()), 16, SIZE) == []
    assert check_cameras(cameras(1), 16, SIZE, 8) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda R: R * 1.01, "no rotation"),
        (lambda R: R @ np.diag([1, 1, -1.0]), "mirrors"),
        (lambda R: R + np.array([[0, 0.02, 0], [0, 0, 0], [0, 0, 0]]), "no rotation"),
        (lambda R: R * np.nan, "not finite"),
    ],
)
def test_poses_that_are_not_rotations_are_refused_with_their_frame(change, told):
    bad = cameras(batch=2)
    R = Rotation.from_euler("xyz", [20, 30, 40], degrees=True).as_matrix()
    bad.c2w[1, 5, :3, :3] = torch.tensor(change(R))
    with pytest.raises(ValueError, match=f"frame 5 of video 1: .*{told}"):
        check_cameras(bad, 16, SIZE)


def test_rotations_rounded_to_four_decimals_pass_and_transposed_poses_do_not():
    fine = cameras(2)
    R = np.round(Rotation.from_euler("xyz", [20, 30, 40], degrees=True).as_matrix(), 4)
    fine.c2w[:, :, :3, :3] = torch.tensor(R)
    assert check_cameras(fine, 16, SIZE) == []
    moved = cameras(3)
    moved.c2w[0, 2, 0, 3] = 0.01
    with pytest.raises(ValueError, match=r"frame 2: the last row is \[0.01.*transposed"):
        check_cameras(Cameras(moved.c2w.mT, moved.intrinsics), 16, SIZE)


@pytest.mark.parametrize("hfov", [24.9, 120.1])
def test_a_field_of_view_beyond_the_limits_is_refused(hfov):
    with pytest.raises(ValueError, match=f"frame 0: field of view {hfov} x"):
        check_cameras(cameras(hfov=hfov), 16, SIZE)


def test_the_field_of_view_counts_on_both_axes_and_off_centre():
    # 33 degrees across a 4:3 picture are 2 atan(3/4 tan 16.5 deg) = 25.05 down it, 32 degrees 24.3
    assert check_cameras(cameras(hfov=33.0), 16, SIZE) == []
    with pytest.raises(ValueError, match="32.0 x 24.3"):
        check_cameras(cameras(hfov=32.0), 16, SIZE)
    off = cameras()
    # tan 65 + tan 50 across: a view from -65 to 50 degrees, 115 in all; then from -75 to 50
    for left, fits in ((65, True), (75, False)):
        width = math.tan(math.radians(left)) + math.tan(math.radians(50))
        off.intrinsics[..., 0], off.intrinsics[..., 2] = 1 / width, math.tan(math.radians(left)) / width
        off.intrinsics[..., 1] = off.intrinsics[..., 0] * SIZE[1] / SIZE[0]
        if fits:
            assert check_cameras(off, 16, SIZE) == []
        else:
            with pytest.raises(ValueError, match="field of view 125.0"):
                check_cameras(off, 16, SIZE)


def test_intrinsics_that_are_missing_or_negative_are_refused():
    none = cameras()
    none.intrinsics[0, 3:] = math.nan
    with pytest.raises(ValueError, match="frame 3: intrinsics"):
        check_cameras(none, 16, SIZE)
    with pytest.raises(ValueError, match="field of view"):
        check_cameras(Cameras(cameras().c2w, -cameras().intrinsics), 16, SIZE)


@pytest.mark.parametrize(("ratio", "warned"), [(1.0, False), (1.2, False), (1.25, True), (0.8, True), (0.83, False)])
def test_pixels_far_from_square_are_warned_of(ratio, warned):
    # |1 - r| / ((1 + r) / 2): 0.182 for 1.2, 0.222 for 1.25 and 0.8, 0.186 for 0.83
    stretched = cameras()
    stretched.intrinsics[0, 4, 1] *= ratio
    found = check_cameras(stretched, 16, SIZE)
    assert bool(found) == warned and all("frame 4: fx and fy" in line for line in found)


def test_speeds_beyond_the_benchmark_are_warned_of_with_frame_and_median():
    fast = cameras()
    fast.c2w[0, :, 2, 3] = torch.arange(9) * 0.02
    assert check_cameras(fast, 16, SIZE) == []  # 0.32 m/s
    fast.c2w[0, 6:, 0, 3] = 1.5
    (line,) = check_cameras(fast, 16, SIZE)
    assert "frame 6: translation at 24 m/s (median 0.32)" in line and "0.4" in line
    turning = cameras()
    for degrees, count in ((0.7, 0), (0.8, 1)):  # 11.2 and 12.8 degrees/s at 16 frames a second
        R = Rotation.from_rotvec(np.outer(np.arange(9), [0, math.radians(degrees), 0])).as_matrix()
        turning.c2w[0, :, :3, :3] = torch.tensor(R)
        assert len(check_cameras(turning, 16, SIZE)) == count
    assert "rotation at 12.8 degrees/s (median 12.8)" in check_cameras(turning, 16, SIZE)[0]
    assert check_cameras(turning, 8, SIZE) == []


@pytest.mark.parametrize(("frames", "nearest"), [(10, "9 and 17"), (8, "1 and 9"), (16, "9 and 17"), (18, "17 and 25")])
def test_lengths_that_do_not_fit_the_stride_name_the_nearest(frames, nearest):
    with pytest.raises(ValueError, match=f"{frames} camera poses .* {nearest}"):
        check_cameras(cameras(frames), 16, SIZE, 8)


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_a_rate_must_be_a_number_above_zero(fps):
    with pytest.raises(ValueError, match="fps"):
        check_cameras(cameras(), fps, SIZE)
