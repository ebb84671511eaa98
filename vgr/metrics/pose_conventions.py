"""Camera-pose errors as published evaluators compute them, by name (specs/benchmarks 4.2), NumPy float64.

Their numbers carry the same words and different units: compare only within a convention. All of them leave frames out
that were not registered; `coverage` says how many are left.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.geometry.alignment import rotation_mean
from vgr.metrics.camera_pose import pose_errors, trajectory_errors

Array = NDArray[np.float64]

KEYS = {
    "sana-wm": ("rot_mean_deg", "trans_mean", "cammc_mean", "scale"),
    "cameractrl": ("rot_sum_rad", "trans_sum", "cammc_sum"),
    "worldscore": ("rot_mean_deg", "trans_mean", "scale", "score_rot", "score_trans", "score"),
    "evo": ("ate_rmse", "rpe_trans_rmse", "rpe_rot_mean_deg", "scale"),
}
WORST = (15.0, 0.5)  # degrees and unit at which WorldScore gives 0


def published_errors(estimated_c2w: ArrayLike, reference_c2w: ArrayLike, convention: str) -> dict[str, float | bool]:
    """Errors of a path (F,4,4) against a reference (F,4,4); rows of NaN are unregistered. Keys: KEYS[convention].

    All but evo put both paths relative to the first frame.
    sana-wm (it takes every 4th frame: hand in those): the world rotation from the mean of R_ref R_est', scale and
    offset by least squares on w2c translations turned by the estimate's rotations; means, in degrees and the
    reference's unit. Where that rotation would mirror, as published code lets it, the nearest that does not is taken.
    cameractrl (coded by CamI2V): each path divided by its own largest offset; sums, in radians.
    worldscore: the scale c that minimises sum |t_ref - c t_est|; means, scores 0 to 100 that fall linearly to 0 at
    WORST, and their geometric mean, its camera control.
    evo: Umeyama with scale on the centres, then ATE and RPE over one frame.
    With coverage and degenerate, as in `pose_errors`. Raises ValueError for an unknown convention and bad paths.
    """
    if convention not in KEYS:
        raise ValueError(f"unknown convention {convention!r}; known: {', '.join(KEYS)}")
    if convention == "evo":
        found = trajectory_errors(estimated_c2w, reference_c2w, align="sim3")
        return {key: found[key] for key in (*KEYS[convention], "coverage", "degenerate")}
    est, ref = (np.array(x, dtype=np.float64) for x in (estimated_c2w, reference_c2w))
    found = pose_errors(est, ref, align="first_frame", scale="none")  # refuses what is no pair of paths
    both = np.isfinite(est).all((1, 2)) & np.isfinite(ref).all((1, 2))
    found["scale"] = np.nan
    if both.sum() >= 2:
        e, r = (np.linalg.inv(x[both][0]) @ x[both] for x in (est, ref))
        scale = 1.0
        if convention == "sana-wm":
            e, scale = _extrinsics_aligned(e, r)
        elif convention == "cameractrl":
            for path in (e, r):
                path[:, :3, 3] /= np.linalg.norm(path[:, :3, 3], axis=1).max() + 1e-9
        else:
            scale = least_distance_scale(e[:, :3, 3], r[:, :3, 3])
            e[:, :3, 3] *= scale
        est[both], ref[both] = e, r
        degenerate = found["degenerate"]
        found = pose_errors(est, ref, align="none", scale="none") | {"scale": scale, "degenerate": degenerate}
    if convention == "worldscore":
        for name, key, worst in zip(("score_rot", "score_trans"), ("rot_mean_deg", "trans_mean"), WORST):
            found[name] = 100 * (1 - min(found[key] / worst, 1.0)) if np.isfinite(found[key]) else 0.0
        found["score"] = float(np.sqrt(found["score_rot"] * found["score_trans"]))
    return {key: found[key] for key in (*KEYS[convention], "coverage", "degenerate")}


def least_distance_scale(est_F3: Array, ref_F3: Array) -> float:
    """The c that minimises sum |ref - c est| (not squared), which is convex; 1 for an estimate that stands still."""
    from scipy.optimize import minimize_scalar

    if np.abs(est_F3).max() < 1e-12:
        return 1.0
    return float(minimize_scalar(lambda c: np.linalg.norm(ref_F3 - c * est_F3, axis=1).sum(), tol=1e-10).x)


def _extrinsics_aligned(est: Array, ref: Array) -> tuple[Array, float]:
    """SANA-WM's alignment of c2w (F,4,4): a, R't of the estimate's w2c, is minus its centre, b has the other t."""
    R, C = est[:, :3, :3], ref[:, :3, :3]
    turn = rotation_mean(R, C)  # the mean of C R' projected on rotations
    a = -est[:, :3, 3]
    b = -(R @ C.swapaxes(1, 2) @ ref[:, :3, 3:])[..., 0]
    a_mean, b_mean = a.mean(0), b.mean(0)
    scale = float(((a - a_mean) * (b - b_mean)).mean() / max(float(((a - a_mean) ** 2).mean()), 1e-9))
    out = est.copy()
    out[:, :3, :3] = turn @ R
    out[:, :3, 3] = -(b_mean + scale * (a - a_mean)) @ turn.T
    return out, scale
