"""Published camera errors by name: closed forms, the published formulas written out, evo as a program of its own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from tests.unit.test_camera_pose import moved, noisy, path
from vgr.metrics.camera_pose import pose_errors, trajectory_errors
from vgr.metrics.pose_conventions import KEYS, least_distance_scale, published_errors

KINDS = ("line", "arc", "loop")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("convention", KEYS)
def test_a_secret_similarity_is_no_error(convention, kind):
    reference = path(kind)
    got = published_errors(moved(reference, 0.2), reference, convention)
    assert set(got) == {*KEYS[convention], "coverage", "degenerate"} and got["degenerate"] == (kind == "line")
    errors = [v for k, v in got.items() if k.startswith(("rot_", "trans_", "cammc_", "ate_", "rpe_"))]
    if convention == "evo" and kind == "line":
        assert np.isnan(got["ate_rmse"])
        return
    assert max(errors) < 1e-6
    if "scale" in got:
        assert got["scale"] == pytest.approx(5.0)


def sana(estimated, reference):
    """SANA-WM's evaluator, formula by formula, on w2c in torch."""
    est, ref = (torch.from_numpy(np.linalg.inv(p[0]) @ p) for p in (estimated, reference))
    src, tgt = torch.linalg.inv(est), torch.linalg.inv(ref)
    r_src, t_src, t_tgt = src[:, :3, :3], src[:, :3, 3], tgt[:, :3, 3]
    u, _, v = torch.svd((tgt[:, :3, :3].mT @ r_src).mean(0))
    turn = v @ u.T
    a, b = ((r_src.mT @ t[..., None])[..., 0] for t in (t_src, t_tgt))
    ac, bc = a - a.mean(0), b - b.mean(0)
    scale = (ac * bc).mean() / (ac**2).mean()
    shift = b.mean(0) - scale * a.mean(0)
    aligned = torch.eye(4, dtype=torch.float64).repeat(len(est), 1, 1)
    aligned[:, :3, :3] = r_src @ turn
    aligned[:, :3, 3] = r_src @ shift + scale * t_src
    c2w = torch.linalg.inv(aligned)
    cosine = ((ref[:, :3, :3].mT @ c2w[:, :3, :3]).diagonal(dim1=-1, dim2=-2).sum(-1) - 1) / 2
    return {
        "rot_mean_deg": torch.rad2deg(cosine.clamp(-1, 1).acos()).mean().item(),
        "trans_mean": (ref - c2w)[:, :3, 3].norm(dim=-1).mean().item(),
        "cammc_mean": (ref - c2w)[:, :3].reshape(-1, 12).norm(dim=-1).mean().item(),
        "scale": scale.item(),
    }


def cami2v(estimated, reference):
    est, ref = (np.linalg.inv(p[0]) @ p for p in (estimated, reference))
    for p in (est, ref):
        p[:, :3, 3] /= np.linalg.norm(p[:, :3, 3], axis=1).max() + 1e-9
    cosine = (np.trace(ref[:, :3, :3].swapaxes(1, 2) @ est[:, :3, :3], axis1=1, axis2=2) - 1) / 2
    return {
        "rot_sum_rad": np.arccos(np.clip(cosine, -1, 1)).sum(),
        "trans_sum": np.linalg.norm((est - ref)[:, :3, 3], axis=1).sum(),
        "cammc_sum": np.linalg.norm((est - ref)[:, :3].reshape(-1, 12), axis=1).sum(),
    }


@pytest.mark.parametrize(("convention", "formula"), [("sana-wm", sana), ("cameractrl", cami2v)])
@pytest.mark.parametrize("kind", KINDS)
def test_noisy_paths_get_the_published_formulas_numbers(convention, formula, kind):
    reference = path(kind)
    for seed, degrees in ((0, 0.5), (1, 10.0)):
        estimate = moved(noisy(reference, seed, degrees, 0.05), 0.3, seed)
        got, want = published_errors(estimate, reference, convention), formula(estimate, reference)
        assert {k: got[k] for k in want} == pytest.approx(want, rel=1e-6)


def test_worldscore_scales_by_distances_not_their_squares():
    reference = path("loop")
    estimate = moved(reference, 0.5)
    reference[40, :3, 3] += 100.0  # one wrong frame: squares would give it all the say
    assert published_errors(estimate, reference, "worldscore")["scale"] == pytest.approx(2.0, rel=1e-3)
    assert abs(pose_errors(estimate, reference, align="first_frame")["scale"] - 2.0) > 0.5
    rng = np.random.default_rng(0)
    est, ref = rng.normal(size=(30, 3)), rng.normal(size=(30, 3)) + 1
    scales = np.linspace(-3, 3, 60001)
    totals = np.linalg.norm(ref - scales[:, None, None] * est, axis=2).sum(1)
    assert least_distance_scale(est, ref) == pytest.approx(scales[totals.argmin()], abs=2e-4)
    assert least_distance_scale(np.zeros((5, 3)), ref[:5]) == 1.0


def test_worldscore_scores_fall_linearly_to_zero():
    reference = path("loop", 49)
    for degrees, want in ((3.0, 80.0), (15.0, 0.0), (40.0, 0.0)):
        estimate = reference.copy()
        estimate[1:, :3, :3] @= Rotation.from_rotvec(np.deg2rad(degrees * 49 / 48) * np.array([0, 0, 1.0])).as_matrix()
        got = published_errors(estimate, reference, "worldscore")
        assert got["score_rot"] == pytest.approx(want) and got["score_trans"] == pytest.approx(100.0)
        assert got["score"] == pytest.approx(10 * want**0.5)
    nothing = published_errors(np.full_like(reference, np.nan), reference, "worldscore")
    assert (nothing["score_rot"], nothing["score_trans"], nothing["coverage"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("convention", KEYS)
def test_unregistered_frames_are_left_out_and_told(convention):
    reference = path("loop")
    estimate = moved(noisy(reference), 3.0)
    estimate[[5, 17, 60]] = np.nan
    known = np.isfinite(estimate).all((1, 2))
    got = published_errors(estimate, reference, convention)
    want = published_errors(estimate[known], reference[known], convention)
    assert got["coverage"] == pytest.approx(58 / 61) and want["coverage"] == 1.0
    same = [k for k in want if k != "coverage" and not k.startswith("rpe_")]  # steps over a hole are no steps
    assert {k: got[k] for k in same} == pytest.approx({k: want[k] for k in same}, rel=1e-9)


def test_an_unknown_convention_is_named():
    with pytest.raises(ValueError, match="'vbench'; known: sana-wm, cameractrl, worldscore, evo"):
        published_errors(path("loop"), path("loop"), "vbench")
    with pytest.raises(ValueError, match=r"\(61, 4, 4\) and \(60, 4, 4\)"):
        published_errors(path("loop"), path("loop")[:60], "sana-wm")


# ------------------------------------------------------------------------------------------ evo, as a program


def tum(file, c2w_F44):
    quaternions = Rotation.from_matrix(c2w_F44[:, :3, :3]).as_quat()
    np.savetxt(file, np.column_stack([np.arange(len(c2w_F44)) / 10, c2w_F44[:, :3, 3], quaternions]), fmt="%.17g")


def evo(tool, folder, *options):
    place = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if place is None:
        pytest.skip("evo is not installed; pip install -e '.[test]'")
    words = [place, "tum", "ref.txt", "est.txt", *options]
    env = {"HOME": str(folder), "MPLBACKEND": "Agg", "PATH": str(Path(place).parent)}
    told = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
    return {name: float(value) for name, value in re.findall(r"^\s+(\w+)\s+([\d.eE+-]+)$", told, re.MULTILINE)}


def test_errors_are_evos(tmp_path):
    """evo prints six decimals."""
    reference = path("loop")
    estimate = moved(noisy(reference, 5, 2.0, 0.05), 0.4)
    tum(tmp_path / "ref.txt", reference)
    tum(tmp_path / "est.txt", estimate)
    ours = published_errors(estimate, reference, "evo")
    assert evo("evo_ape", tmp_path, "-as")["rmse"] == pytest.approx(ours["ate_rmse"], abs=1e-6)
    steps = ("--delta", "1", "--delta_unit", "f")
    moved_by = evo("evo_rpe", tmp_path, "-as", *steps)
    assert moved_by["rmse"] == pytest.approx(ours["rpe_trans_rmse"], abs=1e-6)
    turned_by = evo("evo_rpe", tmp_path, "-as", "-r", "angle_deg", *steps)
    assert turned_by["mean"] == pytest.approx(ours["rpe_rot_mean_deg"], abs=1e-6)
    rigid = trajectory_errors(estimate, reference, align="se3")
    assert evo("evo_ape", tmp_path, "-a")["rmse"] == pytest.approx(rigid["ate_rmse"], abs=1e-6)


# ------------------------------------------------------- golden values (specs/benchmarks 9) on evo's own test data

GOLDEN = [
    ("freiburg1_xyz-groundtruth", "freiburg1_xyz-rgbdslam_drift", "se3", 785, {"ate_rmse": 0.013470}),
    ("freiburg1_xyz-groundtruth", "freiburg1_xyz-rgbdslam", "se3", 785,
     {"ate_rmse": 0.013470, "rpe_trans_rmse": 0.005764, "rpe_rot_mean_deg": 0.300307}),
    ("freiburg1_xyz-groundtruth", "freiburg1_xyz-rgbdslam", "none", 785, {"ate_rmse": 0.020079}),
    ("freiburg1_xyz-groundtruth", "freiburg1_xyz-ORB_kf_mono", "sim3", 32,
     {"ate_rmse": 0.009755, "rpe_rot_mean_deg": 0.787725}),
    ("fr2_desk_groundtruth", "fr2_desk_ORB_kf_mono", "sim3", 118, {"ate_rmse": 0.007729}),
    ("fr2_desk_groundtruth", "fr2_desk_ORB", "sim3", 2174, {"ate_rmse": 0.006123}),
    ("KITTI_00_gt", "KITTI_00_ORB", "se3", 4541, {"ate_rmse": 1.303450}),
    ("KITTI_00_gt", "KITTI_00_ORB", "sim3", 4541, {"ate_rmse": 0.937709}),
    ("KITTI_00_gt", "KITTI_00_SPTAM", "se3", 4541, {"ate_rmse": 3.738488}),
]  # fmt: skip


def recorded(folder, name):
    """Times and poses of a TUM file, or of a KITTI one, whose rotations are written with few digits."""
    table = np.loadtxt(Path(folder) / f"{name}.txt")
    c2w = np.tile(np.eye(4), (len(table), 1, 1))
    if table.shape[1] == 12:
        c2w[:, :3] = table.reshape(-1, 3, 4)
        u, _, vt = np.linalg.svd(c2w[:, :3, :3])
        c2w[:, :3, :3] = u @ vt
        return np.arange(len(table)), c2w
    c2w[:, :3, 3], c2w[:, :3, :3] = table[:, 1:4], Rotation.from_quat(table[:, 4:8]).as_matrix()
    return table[:, 0], c2w


@pytest.mark.skipif("EVO_TEST_DATA" not in os.environ, reason="EVO_TEST_DATA=<test/data of evo's source archive>")
@pytest.mark.parametrize(("truth", "estimate", "align", "count", "want"), GOLDEN)
def test_golden_values(truth, estimate, align, count, want):
    (t_ref, ref), (t_est, est) = (recorded(os.environ["EVO_TEST_DATA"], name) for name in (truth, estimate))
    near = np.abs(t_ref[:, None] - t_est)  # as evo: each time of the shorter path takes the nearest of the longer
    i, j = np.arange(len(t_ref)), np.arange(len(t_est))
    pairs = np.stack([near.argmin(0), j] if len(t_est) <= len(t_ref) else [i, near.argmin(1)])
    pairs = pairs[:, near[tuple(pairs)] <= 0.01]
    assert pairs.shape[1] == count
    got = trajectory_errors(est[pairs[1]], ref[pairs[0]], align=align)
    assert {k: got[k] for k in want} == pytest.approx(want, abs=6e-7)
