"""Camera errors of one video: by optical flow at any size, by structure from motion where pictures are large enough."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vgr.report.table import POSE_ERRORS

Array = NDArray[np.float64]
Path = tuple[Array, Array]  # c2w (F,4,4) and intrinsics (F,4)


def pose_values(video: NDArray[np.uint8], paths: Sequence[Path]) -> list[dict[str, float]]:
    """The camera errors of one video against each (c2w, intrinsics); the flow is read once, with the first's."""
    from vgr.metrics.egomotion import flow_rotation, score_motion

    found = flow_rotation(video, paths[0][1])
    scores = [score_motion(found, c2w) for c2w, _ in paths]
    return [{**{k: float(s[k]) for k in POSE_ERRORS}, "pose_coverage": float(s["coverage"])} for s in scores]


def keyframes(cuts: Sequence[int], count: int, fps: float, settings: dict[str, Any]) -> list[int]:
    """Frames that structure from motion is given: of the longest shot, from its start, `per_s` a second, `frames`."""
    edges = [0, *cuts, count]
    start, end = max(zip(edges, edges[1:]), key=lambda shot: shot[1] - shot[0])
    step = max(1, round(fps / settings["per_s"]))
    return list(range(start, end, step))[: settings["frames"]]


def reconstructed(
    frames: Iterable[NDArray[np.uint8]], at: Sequence[int], fps: float, path: Path | None, settings: dict[str, Any]
) -> tuple[dict[str, float], Array | None]:
    """What structure from motion of frames `at` gives, and the camera of every frame asked for, NaN where unknown.

    path: the commanded one; with it come errors, ours and by every published convention, and the intrinsics where they
    do not change. Nothing where pictures are lower than `least_height`; a reconstruction with a reason not to use it
    counts as not registered.
    """
    import cv2

    from vgr.geometry.reconstruct import reconstruct
    from vgr.metrics.camera_pose import pose_errors
    from vgr.metrics.pose_conventions import KEYS, published_errors

    wanted, small = set(at), []
    for i, frame in enumerate(frames):
        if i in wanted:
            scale = min(1.0, settings["long_side"] / max(frame.shape[:2]))
            size = tuple(round(scale * s) for s in frame.shape[1::-1])
            small.append(cv2.resize(frame, size, interpolation=cv2.INTER_AREA) if scale < 1 else frame)
    if len(small) < 3 or frame.shape[0] < settings["least_height"]:
        return {}, None
    k = None if path is None or np.ptp(path[1][at], axis=0).max() > 1e-6 else path[1][at[0]]
    found = reconstruct(np.stack(small), k, threads=settings["threads"])
    est = np.full_like(found.c2w, np.nan) if found.reason else found.c2w
    known = np.isfinite(est).all((1, 2))
    values = {"sfm_coverage": float(known.mean())}
    if known.any():
        fov = np.rad2deg(2 * np.arctan(0.5 / found.intrinsics[0]))
        turns = np.linalg.inv(est[:-1]) @ est[1:]
        cosine = (np.trace(turns[:, :3, :3], axis1=1, axis2=2) - 1) / 2
        speed = np.rad2deg(np.arccos(np.clip(cosine, -1, 1))) / np.diff(at) * fps
        values |= {"sfm_fov_deg": float(fov), "sfm_turn_deg_per_s": float(np.nanmean(speed))}
    if path is not None:
        reference = path[0][at]
        errors = pose_errors(est, reference)
        values |= {key: float(errors[key]) for key in ("rot_imputed_deg", "trans_imputed", "path_length_ratio")}
        for name, keys in KEYS.items():
            errors = published_errors(est, reference, name)
            values |= {f"{name}_{key}": float(errors[key]) for key in keys}
    return values, est
