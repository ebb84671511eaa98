"""Camera-pose accuracy between an estimated and a reference path (specs/benchmarks 4), NumPy float64.

Poses are camera-to-world, OpenCV axes. Frames an estimator could not register are rows of NaN; every number
says in `coverage` how many frames it rests on. For video too small for structure from motion see
vgr.metrics.egomotion.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from vgr.geometry.alignment import path_rank, rotation_mean, umeyama

ALIGNMENTS = ("none", "first_frame", "se3", "sim3", "rotation_mean")
CENTRES_ONLY = ("se3", "sim3")
SCALES = ("least_squares", "median_ratio", "max_norm", "none")

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
_NAN = float("nan")
_STILL = 1e-3  # a reference whose every centre lies this close to its first does not move (metres)


def _angles(poses_F44: Array) -> Array:
    """Rotation angles (F,), radians in [0, pi]."""
    return Rotation.from_matrix(poses_F44[:, :3, :3]).magnitude()


def _start(
    estimated: ArrayLike, reference: ArrayLike, align: str, keys: tuple[str, ...]
) -> tuple[Array, Array, Mask, Mask, dict[str, float | bool]]:
    """Both paths as float64, the frames the reference has, those both have, and a result without numbers yet.

    ValueError for shapes, an unknown alignment and for what is no rotation.
    """
    est, ref = np.asarray(estimated, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if est.shape != ref.shape or est.ndim != 3 or est.shape[1:] != (4, 4) or len(est) == 0:
        raise ValueError(
            f"estimated_c2w and reference_c2w must both be (F, 4, 4), F >= 1; got {est.shape} and {ref.shape}"
        )
    if align not in ALIGNMENTS:
        raise ValueError(f"unknown align {align!r}; known: {', '.join(ALIGNMENTS)}")
    expected = np.isfinite(ref).all((1, 2))
    both = expected & np.isfinite(est).all((1, 2))
    for name, path in (("estimated_c2w", est), ("reference_c2w", ref)):
        R = path[both, :3, :3]
        bad = (np.abs(R @ R.swapaxes(-1, -2) - np.eye(3)) > 1e-2).any((1, 2)) | (np.linalg.det(R) < 0)
        if bad.any():
            frame = np.flatnonzero(both)[bad.argmax()]
            raise ValueError(f"{name} frame {frame} is no rigid pose: its 3x3 part is not a rotation")
    result: dict[str, float | bool] = dict.fromkeys(keys, _NAN)
    result["coverage"] = float(both.sum() / max(expected.sum(), 1))
    result["degenerate"] = _degenerate(est[both], ref[both], align)
    return est, ref, expected, both, result


def _fit_scale(est_F3: Array, ref_F3: Array, scale: str) -> float:
    """Factor on the estimate's offsets; NaN where the estimate or the reference does not move.

    A negative least-squares factor (a path run backwards) becomes 0: a scale cannot mirror a path.
    """
    if scale == "none":
        return 1.0
    est_norm, ref_norm = np.linalg.norm(est_F3, axis=1), np.linalg.norm(ref_F3, axis=1)
    if est_norm.max() < 1e-12 or ref_norm.max() < _STILL:
        return _NAN
    if scale == "least_squares":
        return max(0.0, float((est_F3 * ref_F3).sum() / (est_F3**2).sum()))
    if scale == "max_norm":
        return float(ref_norm.max() / est_norm.max())
    moved = (est_norm > 1e-12) & (ref_norm > 1e-12)
    return float(np.median(ref_norm[moved] / est_norm[moved])) if moved.any() else _NAN


def _align(est: Array, ref: Array, align: str, scale: str) -> tuple[Array, Array, float]:
    """Aligned estimate, reference in the same frame, and the scale used (NaN, acting as 1, where undefined).

    All but `none` put both paths relative to their first common frame. `first_frame` stops there and scales
    about it; `rotation_mean` takes the world rotation from the cameras' orientations, then scale and offset of
    the centres about their means; `se3` and `sim3` fit the centres (Umeyama) and ignore `scale`.
    """
    if align != "none":
        est, ref = np.linalg.inv(est[0]) @ est, np.linalg.inv(ref[0]) @ ref
    est = est.copy()
    R, centres, target = np.eye(3), est[:, :3, 3], ref[:, :3, 3]
    if align in CENTRES_ONLY:
        s, R, t = umeyama(centres, target, with_scale=align == "sim3")
    elif align == "rotation_mean":
        R = rotation_mean(est[:, :3, :3], ref[:, :3, :3])
        turned = centres @ R.T
        s = _fit_scale(turned - turned.mean(0), target - target.mean(0), scale)
        t = target.mean(0) - (1.0 if np.isnan(s) else s) * turned.mean(0)
    else:
        s, t = _fit_scale(centres, target, scale), np.zeros(3)
    est[:, :3, 3] = (1.0 if np.isnan(s) else s) * centres @ R.T + t
    est[:, :3, :3] = R @ est[:, :3, :3]
    return est, ref, s


def _moves(path: Array) -> bool:
    return bool(np.linalg.norm(path[:, :3, 3] - path[0, :3, 3], axis=1).max() >= _STILL)


def _degenerate(est: Array, ref: Array, align: str) -> bool:
    if len(ref) < 2 or path_rank(ref[:, :3, 3]) < 2:
        return True
    spread = np.abs(est[:, :3, 3] - est[0, :3, 3]).max()  # the estimate's unit is its own: judge the shape alone
    return align in CENTRES_ONLY and (spread < 1e-12 or path_rank(est[:, :3, 3] / spread) < 2)


def pose_errors(
    estimated_c2w: ArrayLike,
    reference_c2w: ArrayLike,
    align: str = "rotation_mean",
    scale: str = "least_squares",
) -> dict[str, float | bool]:
    """Rotation, translation and CamMC errors of a path (F,4,4) against a reference (F,4,4), specs/benchmarks 4.1.

    rot_mean_deg, rot_sum_rad: geodesic angles; trans_mean, trans_sum: distances in the reference's unit; cammc_mean,
    cammc_sum: Frobenius norms of the 3x4 matrices' difference; over frames both paths have. rot_imputed_deg and
    trans_imputed count missing frames as not having moved. align and scale: ALIGNMENTS, SCALES; sim3 fits its own
    scale, se3 none. scale: factor put on the estimate. coverage: share of the reference's frames that are registered
    (others are rows of NaN). path_length_ratio (before alignment) and speed_correlation (Pearson's r of step lengths)
    show an estimate that hardly moves, which a fitted scale hides.

    degenerate: the reference (for se3 and sim3 also the estimate) stands still, only turns or runs straight, or fewer
    than two frames are registered. What that leaves undetermined is NaN: everything after `se3` or `sim3`, whose
    rotation the centres cannot give; translation and CamMC where the reference stands still, the estimate does not,
    and a scale would have to be fitted. Rotations under `rotation_mean` and `first_frame` stay meaningful.
    """
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; known: {', '.join(SCALES)}")
    keys = ("rot_mean_deg", "rot_sum_rad", "trans_mean", "trans_sum", "cammc_mean", "cammc_sum", "scale",
            "rot_imputed_deg", "trans_imputed", "path_length_ratio", "speed_correlation")  # fmt: skip
    est, ref, expected, both, result = _start(estimated_c2w, reference_c2w, align, keys)
    if not expected.any():
        return result
    enough = both.sum() >= 2
    # The errors of an estimate that never moved, kept where nothing was registered.
    relative = np.linalg.inv(ref[both if enough else expected][0]) @ ref[expected]
    turned, gone = _angles(relative), np.linalg.norm(relative[:, :3, 3], axis=1)
    if enough:
        e, r, s = _align(est[both], ref[both], align, scale)
        angle = _angles(np.linalg.inv(r) @ e)
        distance, cammc = np.linalg.norm((r - e)[:, :3, 3], axis=1), np.linalg.norm((r - e)[:, :3], axis=(1, 2))
        centres_only = align in CENTRES_ONLY and result["degenerate"]
        if centres_only:
            angle[:] = _NAN
        if centres_only or (scale != "none" and not _moves(ref[both]) and _moves(est[both])):
            distance[:] = cammc[:] = s = _NAN
        turned[both[expected]], gone[both[expected]] = angle, distance
        result |= {"rot_mean_deg": float(np.rad2deg(angle.mean())), "rot_sum_rad": float(angle.sum())}
        result["scale"] = float(s)
        for name, x in (("trans", distance), ("cammc", cammc)):
            result |= {f"{name}_mean": float(x.mean()), f"{name}_sum": float(x.sum())}
        result |= _speed_profile(est[both, :3, 3], ref[both, :3, 3])
    return result | {"rot_imputed_deg": float(np.rad2deg(turned.mean())), "trans_imputed": float(gone.mean())}


def _speed_profile(est_F3: Array, ref_F3: Array) -> dict[str, float]:
    a, b = (np.linalg.norm(np.diff(x, axis=0), axis=1) for x in (est_F3, ref_F3))
    varies = len(a) > 1 and min(np.std(a) / max(a.max(), 1e-12), np.std(b) / max(b.max(), 1e-12)) > 1e-9
    return {
        "path_length_ratio": float(a.sum() / b.sum()) if b.sum() >= _STILL else _NAN,
        "speed_correlation": float(np.corrcoef(a, b)[0, 1]) if varies else _NAN,
    }


def trajectory_errors(
    estimated_c2w: ArrayLike, reference_c2w: ArrayLike, align: str = "sim3", delta: int = 1
) -> dict[str, float | bool]:
    """ATE and RPE of a path (F,4,4) against a reference (F,4,4), as evo and TUM define them (specs/benchmarks 4.1).

    ate_rmse: root mean square distance of aligned centres; rpe_trans_rmse and rpe_rot_mean_deg: relative motion over
    `delta` frames, E = (Q_i^-1 Q_i+d)^-1 (P_i^-1 P_i+d), of pairs both registered (others are rows of NaN). `sim3` and
    `rotation_mean` fit a scale, the others none. coverage, scale and degenerate as in `pose_errors`: ate_rmse is then
    NaN under `se3` and `sim3`, and what needs a fitted scale where the reference stands still.
    """
    keys = ("ate_rmse", "rpe_trans_rmse", "rpe_rot_mean_deg", "scale")
    est, ref, _, both, result = _start(estimated_c2w, reference_c2w, align, keys)
    if both.sum() < 2:
        return result
    fitted = align in ("sim3", "rotation_mean")
    aligned, r, s = _align(est[both], ref[both], align, "least_squares" if fitted else "none")
    no_scale = fitted and not _moves(ref[both]) and _moves(est[both])
    if not no_scale and not (align in CENTRES_ONLY and result["degenerate"]):
        result["ate_rmse"] = float(np.sqrt(((aligned - r)[:, :3, 3] ** 2).sum(1).mean()))
    result["scale"] = _NAN if no_scale else float(s)
    pairs = np.flatnonzero(both[:-delta] & both[delta:])
    if len(pairs):
        p, q = (np.linalg.inv(x[pairs]) @ x[pairs + delta] for x in (est, ref))
        p[:, :3, 3] *= _NAN if no_scale else 1.0 if np.isnan(s) else s
        error = np.linalg.inv(q) @ p
        result["rpe_trans_rmse"] = float(np.sqrt((error[:, :3, 3] ** 2).sum(1).mean()))
        result["rpe_rot_mean_deg"] = float(np.rad2deg(_angles(error).mean()))
    return result
