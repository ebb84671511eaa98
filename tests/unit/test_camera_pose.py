"""Pose errors on analytic cases, and the flow estimator on exactly rendered video of a textured room."""

import math

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vgr.metrics.camera_pose import pose_errors, trajectory_errors
from vgr.metrics.egomotion import flow_rotation, score_motion

# ---------------------------------------------------------------------------------- paths and analytic errors


def poses(centres, rotations=None):
    c2w = np.tile(np.eye(4), (len(centres), 1, 1))
    c2w[:, :3, 3] = centres
    if rotations is not None:
        c2w[:, :3, :3] = rotations.as_matrix()
    return c2w


def path(kind, frames=61):
    u = np.linspace(0, 1, frames)
    turn = Rotation.from_euler("yx", np.stack([40 * u, 10 * np.sin(5 * u)], 1), degrees=True)
    if kind == "line":
        return poses(np.stack([0 * u, 0 * u, 3 * u], 1), turn)
    if kind == "arc":
        return poses(np.stack([np.cos(u * np.pi / 2), 0 * u, np.sin(u * np.pi / 2)], 1), turn)
    if kind == "loop":
        a = 2 * np.pi * u
        return poses(np.stack([np.cos(a), 0.3 * np.sin(2 * a), np.sin(a)], 1), turn)
    assert kind == "rotation"
    return poses(np.zeros((frames, 3)), turn)


def moved(c2w, scale=1.0, seed=0):
    """The same path in another world frame and unit: a secret Sim(3)."""
    world = np.eye(4)
    world[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    world[:3, 3] = np.random.default_rng(seed).normal(size=3)
    out = world @ c2w
    out[:, :3, 3] *= scale
    return out


def noisy(c2w, seed=0, degrees=0.5, metres=0.005):
    rng = np.random.default_rng(seed)
    out = c2w.copy()
    out[:, :3, :3] @= Rotation.from_rotvec(np.deg2rad(degrees) * rng.normal(size=(len(c2w), 3))).as_matrix()
    out[:, :3, 3] += metres * rng.normal(size=(len(c2w), 3))
    return out


@pytest.mark.parametrize("degrees", [0.01, 3.0, 60.0])
@pytest.mark.parametrize("kind", ["line", "loop", "rotation"])
def test_constant_offset_gives_the_closed_forms(degrees, kind):
    """A rotation offset on all frames but the first (specs/benchmarks 11.7): closed forms of all three errors."""
    reference = path(kind, 49)
    estimate = reference.copy()
    estimate[1:, :3, :3] @= Rotation.from_rotvec(np.deg2rad(degrees) * np.array([0.6, 0, 0.8])).as_matrix()
    got = pose_errors(estimate, reference, align="first_frame")
    frames, alpha = 49, np.deg2rad(degrees)
    assert got["rot_mean_deg"] == pytest.approx(degrees * (frames - 1) / frames)
    assert got["rot_sum_rad"] == pytest.approx((frames - 1) * alpha)
    per_frame = 2 * math.sqrt(2) * math.sin(alpha / 2)
    assert got["cammc_sum"] == pytest.approx((frames - 1) * per_frame)
    assert got["cammc_mean"] == pytest.approx((frames - 1) / frames * per_frame)
    assert got["trans_sum"] == pytest.approx(0, abs=1e-9)
    assert got["coverage"] == 1.0


def test_known_translation_error():
    reference = path("loop")
    estimate = reference.copy()
    estimate[1:, :3, 3] += [0.3, 0.0, 0.4]
    got = pose_errors(estimate, reference, align="none", scale="none")
    assert got["trans_sum"] == pytest.approx(0.5 * 60)
    assert got["trans_mean"] == pytest.approx(0.5 * 60 / 61)
    assert trajectory_errors(estimate, reference, align="none")["ate_rmse"] == pytest.approx(0.5 * math.sqrt(60 / 61))


@pytest.mark.parametrize("kind", ["line", "arc", "loop"])
@pytest.mark.parametrize("align", ["rotation_mean", "first_frame", "sim3"])
@pytest.mark.parametrize("scale", ["least_squares", "median_ratio", "max_norm"])
def test_a_secret_similarity_is_recovered(kind, align, scale):
    reference = path(kind)
    got = pose_errors(moved(reference, 0.2), reference, align=align, scale=scale)
    assert got["degenerate"] == (kind == "line")
    if kind == "line" and align == "sim3":
        assert math.isnan(got["rot_mean_deg"]) and math.isnan(got["trans_mean"])
        return
    assert got["scale"] == pytest.approx(5.0)
    assert max(got["rot_mean_deg"], got["trans_mean"], got["cammc_mean"]) < 1e-6
    assert got["path_length_ratio"] == pytest.approx(0.2)
    ate = trajectory_errors(moved(reference, 0.2), reference, align=align if align != "first_frame" else "sim3")
    if kind != "line":
        assert max(ate["ate_rmse"], ate["rpe_trans_rmse"], ate["rpe_rot_mean_deg"]) < 1e-6
        assert ate["scale"] == pytest.approx(5.0)


@pytest.mark.parametrize("kind", ["line", "arc", "loop", "rotation"])
def test_rotation_mean_is_immune_to_what_breaks_centres_only_alignment(kind):
    """The table of specs/benchmarks 4.4: 0.5 degrees of noise an axis, a secret Sim(3), 20 repeats."""
    reference, results = path(kind), {}
    for align in ("rotation_mean", "first_frame", "sim3"):
        runs = [pose_errors(moved(noisy(reference, s), 0.4, s), reference, align=align) for s in range(20)]
        results[align] = np.mean([r["rot_mean_deg"] for r in runs])
        assert all(r["degenerate"] == (kind in ("line", "rotation")) for r in runs)
    assert 0.7 < results["rotation_mean"] < 0.9  # mean norm of three 0.5 degree normals: 0.80
    assert results["rotation_mean"] < results["first_frame"] < 1.6
    if kind in ("line", "rotation"):
        assert math.isnan(results["sim3"]), "an undetermined rotation is not printed as a number"
    else:
        assert results["sim3"] == pytest.approx(results["rotation_mean"], rel=0.35)


def test_unregistered_frames():
    reference = path("loop")
    estimate = moved(reference, 3.0)
    estimate[[0, 7, 8, 30]] = np.nan
    got = pose_errors(estimate, reference)
    assert got["coverage"] == pytest.approx(57 / 61)
    assert max(got["rot_mean_deg"], got["trans_mean"]) < 1e-6
    start = np.linalg.inv(reference[1]) @ reference[[0, 7, 8, 30]]  # relative to the first registered frame
    want = np.rad2deg(Rotation.from_matrix(start[:, :3, :3]).magnitude()).sum() / 61
    assert got["rot_imputed_deg"] == pytest.approx(want)
    assert got["trans_imputed"] == pytest.approx(np.linalg.norm(start[:, :3, 3], axis=1).sum() / 61)
    ate = trajectory_errors(estimate, reference)
    assert ate["coverage"] == pytest.approx(57 / 61)
    assert max(ate["ate_rmse"], ate["rpe_trans_rmse"], ate["rpe_rot_mean_deg"]) < 1e-6

    nothing = pose_errors(np.full_like(reference, np.nan), reference)
    assert nothing["coverage"] == 0 and nothing["degenerate"] and math.isnan(nothing["rot_mean_deg"])
    relative = np.linalg.inv(reference[0]) @ reference
    assert nothing["rot_imputed_deg"] == pytest.approx(
        np.rad2deg(Rotation.from_matrix(relative[:, :3, :3]).magnitude()).mean()
    )
    assert math.isnan(trajectory_errors(np.full_like(reference, np.nan), reference)["ate_rmse"])


def test_a_still_reference_gives_rotations_only():
    reference = path("rotation")
    got = pose_errors(noisy(reference), reference)
    assert got["degenerate"] and 0.5 < got["rot_mean_deg"] < 1.2
    assert math.isnan(got["trans_mean"]) and math.isnan(got["scale"])
    assert pose_errors(noisy(reference), reference, scale="none")["trans_mean"] > 0
    ate = trajectory_errors(noisy(reference), reference)
    assert ate["degenerate"] and math.isnan(ate["ate_rmse"]) and math.isnan(ate["rpe_trans_rmse"])
    assert ate["rpe_rot_mean_deg"] > 0.5


def test_a_still_estimate_scores_the_path_itself_and_shows_it():
    reference = path("loop")
    got = pose_errors(np.tile(np.eye(4), (61, 1, 1)), reference, align="first_frame")
    relative = np.linalg.inv(reference[0]) @ reference
    assert got["trans_mean"] == pytest.approx(np.linalg.norm(relative[:, :3, 3], axis=1).mean())
    assert got["path_length_ratio"] == 0
    backwards = poses(-relative[:, :3, 3])
    assert pose_errors(backwards, reference, align="first_frame")["scale"] == 0, "a scale does not mirror a path"


def test_relative_pose_error_by_hand():
    """A steady 1 degree and 0.1 m drift a frame is an RPE of exactly that, and delta multiplies it."""
    reference = poses(np.zeros((20, 3)))
    step = np.eye(4)
    step[:3, :3], step[:3, 3] = Rotation.from_euler("z", 1, degrees=True).as_matrix(), [0, 0, 0.1]
    estimate = np.stack([np.linalg.matrix_power(step, i) for i in range(20)])
    got = trajectory_errors(estimate, reference, align="none")
    assert got["rpe_rot_mean_deg"] == pytest.approx(1.0) and got["rpe_trans_rmse"] == pytest.approx(0.1)
    got = trajectory_errors(estimate, reference, align="se3", delta=4)
    assert got["rpe_rot_mean_deg"] == pytest.approx(4.0) and got["rpe_trans_rmse"] == pytest.approx(0.4)


def test_axis_conventions_are_not_interchangeable():
    """OpenGL axes or world-to-camera poses given by mistake give large errors on a move with yaw and roll."""
    u = np.linspace(0, 1, 30)
    turn = Rotation.from_euler("yz", np.stack([40 * u, 15 * u], 1), degrees=True)
    reference = poses(np.stack([u, 0.2 * u**2, 2 * u], 1), turn)
    for wrong in (reference @ np.diag([1.0, -1, -1, 1]), np.linalg.inv(reference)):
        assert pose_errors(wrong, reference, align="first_frame")["rot_mean_deg"] > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [({"align": "umeyama"}, "umeyama.*rotation_mean"), ({"scale": "lsq"}, "lsq.*least_squares")],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pose_errors(path("loop"), path("loop"), **options)


def test_bad_paths_are_named():
    with pytest.raises(ValueError, match=r"\(61, 4, 4\) and \(60, 4, 4\)"):
        pose_errors(path("loop"), path("loop")[:60])
    broken = path("loop")
    broken[5, :3, :3] *= 2
    with pytest.raises(ValueError, match="estimated_c2w frame 5"):
        trajectory_errors(broken, path("loop"))


# ------------------------------------------------------------------------- flow on a rendered room, exact truth

FOCAL_X = 0.5  # 90 degrees
ROOM = np.array([3.0, 1.5, 4.0])  # half sizes of the box, metres


def textures(seed):
    """Six 256x256x3 textures of smooth noise at three scales."""
    import cv2

    rng = np.random.default_rng(seed)
    total = np.zeros((6, 256, 256, 3))
    for cells in (8, 24, 64):
        for face in range(6):
            total[face] += cv2.resize(rng.uniform(-1, 1, (cells, cells, 3)), (256, 256), interpolation=cv2.INTER_CUBIC)
    return np.clip(127 + 60 * total, 0, 255).astype(np.float32)


def render(c2w, width, height, seed=0, focal=FOCAL_X, over=2):
    """Frames (F,H,W,3) uint8 of the box room by ray casting, averaged over `over` x `over` rays a pixel."""
    import cv2

    faces = textures(seed)
    w, h = width * over, height * over
    x, y = np.meshgrid((np.arange(w) + 0.5 - w / 2) / (focal * w), (np.arange(h) + 0.5 - h / 2) / (focal * w))
    local = np.stack([x, y, np.ones_like(x)], -1)
    frames = []
    for pose in c2w:
        d, o = local @ pose[:3, :3].T, pose[:3, 3]
        reach = (np.sign(d) * ROOM - o) / np.where(d == 0, 1e-12, d)  # distance to the wall ahead on each axis
        axis = reach.argmin(-1)
        point = (o + d * reach.min(-1, keepdims=True)) / 4.0
        face = 2 * axis + (np.take_along_axis(d, axis[..., None], -1)[..., 0] > 0)
        u = np.where(axis == 0, point[..., 2], point[..., 0]) * 127 + 127.5
        v = np.where(axis == 1, point[..., 2], point[..., 1]) * 127 + 127.5
        image = np.zeros((h, w, 3), np.float32)
        for index in range(6):
            sampled = cv2.remap(faces[index], u.astype(np.float32), v.astype(np.float32), cv2.INTER_LINEAR)
            image[face == index] = sampled[face == index]
        frames.append(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))
    return np.rint(np.stack(frames)).astype(np.uint8)


def walk(seed, frames=33):
    """Smooth yaw of a few degrees a frame and a walk of some centimetres a frame, inside the room."""
    rng = np.random.default_rng(seed)
    t = np.arange(frames) / 64
    yaw = 40 * np.sin(2 * np.pi * (t * rng.uniform(0.6, 1.2) + rng.uniform())) + rng.uniform(0, 360)
    a, b = rng.uniform(0, 2 * np.pi, 2)
    centres = np.stack([1.2 * np.sin(4 * t + a), 0.3 * np.sin(3 * t + b), 1.8 * np.cos(4 * t + b)], 1)
    return poses(centres, Rotation.from_euler("y", yaw[:, None], degrees=True))


def intrinsics(width, height):
    return np.array([FOCAL_X, FOCAL_X * width / height, 0.5, 0.5])


@pytest.mark.parametrize(("width", "height", "rot", "heading"), [(128, 96, 0.15, 8.0), (64, 48, 0.4, 16.0)])
def test_flow_separates_the_true_path_from_a_swapped_one(width, height, rot, heading):
    k, rows = intrinsics(width, height), []
    paths = [walk(seed) for seed in range(4)]
    for index, c2w in enumerate(paths):
        frames = render(c2w, width, height, seed=index)
        found = flow_rotation(frames, k)
        true, swapped = score_motion(found, c2w), score_motion(found, paths[(index + 1) % 4])
        assert swapped["rot_step_mean_deg"] > 3 * true["rot_step_mean_deg"]
        assert swapped["heading_mean_deg"] > 3 * true["heading_mean_deg"]
        assert true["coverage"] > 0.95 and (~found.still[found.reliable]).mean() > 0.95
        turn = Rotation.from_matrix(np.linalg.inv(c2w[:-1, :3, :3]) @ c2w[1:, :3, :3]).as_rotvec()
        assert np.corrcoef(found.rotation[:, 1], turn[:, 1])[0, 1] > 0.97
        assert (found.rotation * turn).sum() / (turn**2).sum() == pytest.approx(1.0, abs=0.1)
        rows.append(true)
    assert np.mean([r["rot_step_mean_deg"] for r in rows]) < rot
    assert np.mean([r["heading_mean_deg"] for r in rows]) < heading


def test_flow_signs_on_pure_motions():
    """Forward, right and up moves and turns about each axis come back with their OpenCV signs."""
    k, still, frames = intrinsics(128, 96), np.zeros((6, 3)), np.arange(6)[:, None]
    start = np.array([0.3, 0.2, -1.0])
    for axis in range(3):
        for sign in (1, -1):
            direction = sign * np.eye(3)[axis]
            found = flow_rotation(render(poses(start + 0.06 * frames * direction), 128, 96), k)
            assert found.reliable.all() and not found.still.any()
            assert (found.heading @ direction).min() > 0.98
            assert np.rad2deg(np.linalg.norm(found.rotation, axis=1)).max() < 0.3
            turn = Rotation.from_rotvec(np.deg2rad(1.5) * frames * direction)
            found = flow_rotation(render(poses(start + still, turn), 128, 96), k)
            np.testing.assert_allclose(np.rad2deg(found.rotation), np.tile(1.5 * direction, (5, 1)), atol=0.2)


def step_degrees(c2w):
    """Mean turn from frame to frame: the rotation error of a still video."""
    steps = Rotation.from_matrix(c2w[:-1, :3, :3]).inv() * Rotation.from_matrix(c2w[1:, :3, :3])
    return np.rad2deg(steps.magnitude()).mean()


def test_standing_still_has_no_heading_and_counts_as_ninety_degrees_where_the_command_moves():
    k, c2w = intrinsics(128, 96), walk(0, 17)
    frozen = np.repeat(render(c2w[:1], 128, 96), 17, axis=0)
    found = flow_rotation(frozen, k)
    assert found.still.all() and np.isnan(found.heading).all() and found.coverage == 1.0
    got = score_motion(found, c2w)
    assert got["heading_mean_deg"] == 90.0
    assert got["rot_step_mean_deg"] == pytest.approx(step_degrees(c2w))
    # A camera that only turns stands still too, and is asked for no heading when the command says so.
    turning = poses(np.zeros((9, 3)), Rotation.from_euler("y", 2.0 * np.arange(9)[:, None], degrees=True))
    found = flow_rotation(render(turning, 128, 96), k)
    got = score_motion(found, turning)
    assert (~found.still[found.reliable]).mean() < 0.3
    assert math.isnan(got["heading_mean_deg"]) and got["rot_step_mean_deg"] < 0.15


def test_a_moving_thing_does_not_carry_the_camera_away():
    """A textured square crossing the picture, a tenth of its area."""
    c2w, k = walk(3), intrinsics(128, 96)
    frames = render(c2w, 128, 96).copy()
    patch = np.random.default_rng(0).integers(0, 255, (36, 34, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        frame[30:66, 2 * index : 2 * index + 34] = patch
    got = score_motion(flow_rotation(frames, k), c2w)
    assert got["rot_step_mean_deg"] < 0.3 and got["heading_mean_deg"] < 15


def test_no_texture_and_noise_are_not_covered():
    c2w, k = walk(1, 9), intrinsics(64, 48)
    flat = np.full((9, 48, 64, 3), 120, np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)
    for frames in (flat, noise):
        got = score_motion(flow_rotation(frames, k), c2w)
        assert got["coverage"] < 0.3
        assert got["rot_step_imputed_deg"] > 0.5 * step_degrees(c2w)
        assert 60 < got["heading_imputed_deg"] < 120
    assert math.isnan(score_motion(flow_rotation(flat, k), c2w)["rot_step_mean_deg"])


def test_changing_intrinsics():
    c2w = walk(2)
    frames = render(c2w, 128, 96)
    got = score_motion(flow_rotation(frames, np.tile(intrinsics(128, 96), (33, 1))), c2w)
    assert got["rot_step_mean_deg"] < 0.15 and got["coverage"] > 0.9
    wrong = score_motion(flow_rotation(frames, intrinsics(128, 96) * [2, 2, 1, 1]), c2w)
    assert wrong["rot_step_mean_deg"] > 5 * got["rot_step_mean_deg"], "the focal length is used"
    # A zoom is the cameras' own doing: with the intrinsics of each frame no motion is read into it.
    k = np.tile(intrinsics(128, 96), (9, 1))
    k[:, :2] *= 1.03 ** np.arange(9)[:, None]
    zooming = np.concatenate([render(poses(np.zeros((1, 3))), 128, 96, focal=row[0]) for row in k])
    assert np.rad2deg(np.linalg.norm(flow_rotation(zooming, k).rotation, axis=1)).max() < 0.2
    assert np.median(flow_rotation(zooming, k).parallax_px) < 0.16 < np.median(flow_rotation(zooming, k[0]).parallax_px)


@pytest.mark.parametrize(
    ("frames", "k", "message"),
    [
        (np.zeros((9, 48, 64, 3), np.float32), np.ones(4), "uint8"),
        (np.zeros((9, 48, 64), np.uint8), np.ones(4), r"\(F, H, W, 3\)"),
        (np.zeros((1, 48, 64, 3), np.uint8), np.ones(4), "F >= 2"),
        (np.zeros((9, 48, 64, 3), np.uint8), np.ones((3, 4)), "intrinsics"),
    ],
)
def test_flow_names_bad_input(frames, k, message):
    with pytest.raises(ValueError, match=message):
        flow_rotation(frames, k)


def test_flow_score_wants_a_pose_a_frame():
    found = flow_rotation(np.zeros((9, 48, 64, 3), np.uint8), intrinsics(64, 48))
    with pytest.raises(ValueError, match=r"\(9, 4, 4\)"):
        score_motion(found, walk(0, 8))
