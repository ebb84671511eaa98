"""Camera motion from frame to frame by optical flow, for video too small for structure from motion.

At 64x48 to 160x120 pixels reconstructions fail or are degrees off even on true video, while the small motion between
frames is well seen by flow: corner tracks (Lucas-Kanade), then rotation and heading (direction of translation; its
scale cannot be seen) that best satisfy the epipolar constraint f1 . (t x R f2) = 0. One track per cell of a grid,
weighted by its forward-backward error; a rotation-only fit; for each of a fan of headings the rotation that fits best
(a linear problem); the four best, apart from each other, refined in all five unknowns by reweighted Gauss-Newton with
Cauchy weights, so that moving things lose their say; the lowest robust cost wins. All steps of a clip at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

_CELLS = 21  # grid cells across the image: 21 x 16 tracks on 4:3
_SMALL_WIDTH = 200  # narrower frames are doubled in size, where tracking is more exact
_WINDOW = 11
_MIN_CORNER = 2e-6  # least eigenvalue of the structure tensor (cv2's scale): below, no texture to track
_ROUND_TRIP_PX = 0.3  # forward-backward error at which a track's weight has fallen to 1/e
_NOISE_PX = 0.1  # residual at which a track's robust weight has fallen to 1/2
_STILL_PX = 0.16  # median motion left after derotation that tracking noise alone explains
_MIN_SHARE = 0.05  # a step is reliable if the tracks' weights sum to this share of the cells (at least 15)
_STARTS = 4
_COMMAND_METRES = 0.005  # a commanded step shorter than this asks for no heading


@dataclass(frozen=True)
class FlowMotion:
    """Estimates of S = F - 1 steps from frame i to frame i + 1.

    rotation (S,3) radians: rotation vector of camera i+1 seen from camera i; heading (S,3): unit direction
    of its centre in camera i's axes, NaN where the step stands still or is unreliable; parallax_px (S,): median
    motion left after derotation, pixels; reliable (S,), still (S,) bool.
    """

    rotation: Array
    heading: Array
    parallax_px: Array
    reliable: NDArray[np.bool_]
    still: NDArray[np.bool_]

    @property
    def coverage(self) -> float:
        """Share of steps with enough reliable flow."""
        return float(self.reliable.mean())


def _track(frames_FHW3: NDArray[np.uint8]) -> tuple[Array, Array, Array]:
    """Tracks from frame i to i + 1: start and end (S,N,2) in pixels from the image's edges, weights (S,N)."""
    import cv2

    height, width = frames_FHW3.shape[1:3]
    up = 2 if width < _SMALL_WIDTH else 1
    grey = [cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in frames_FHW3]
    if up > 1:
        grey = [cv2.resize(g, None, fx=up, fy=up, interpolation=cv2.INTER_CUBIC) for g in grey]
    cell = max(4, round(width * up / _CELLS))
    rows, columns = height * up // cell, width * up // cell
    top, left = (height * up - rows * cell) // 2, (width * up - columns * cell) // 2
    index = np.arange(rows * columns)
    options = dict(winSize=(_WINDOW, _WINDOW), maxLevel=3, minEigThreshold=1e-5, criteria=(3, 12, 0.01))
    starts, ends, weights = [], [], []
    for a, b in zip(grey, grey[1:]):
        corner = cv2.cornerMinEigenVal(a, 5, 3)[top : top + rows * cell, left : left + columns * cell]
        corner = corner.reshape(rows, cell, columns, cell).swapaxes(1, 2).reshape(-1, cell * cell)
        best = corner.argmax(1)
        p = np.stack(
            [left + index % columns * cell + best % cell, top + index // columns * cell + best // cell], axis=-1
        ).astype(np.float32)
        q, found, _ = cv2.calcOpticalFlowPyrLK(a, b, p, None, **options)
        back, returned, _ = cv2.calcOpticalFlowPyrLK(b, a, q, None, **options)
        inside = ((q >= 0) & (q <= (width * up - 1, height * up - 1))).all(1)
        ok = inside & (found.ravel() > 0) & (returned.ravel() > 0) & (corner.max(1) > _MIN_CORNER)
        error = np.linalg.norm(back - p, axis=1) / up
        starts.append((p + 0.5) / up)
        ends.append((np.where(ok[:, None], q, p) + 0.5) / up)
        weights.append(np.where(ok, np.exp(-((error / _ROUND_TRIP_PX) ** 2)), 0.0))
    return tuple(np.stack(x).astype(np.float64) for x in (starts, ends, weights))  # type: ignore[return-value]


def _cross(a: Array, b: Array) -> Array:
    """np.cross over the last axis, several times faster on many short vectors."""
    a0, a1, a2, b0, b1, b2 = (*np.moveaxis(a, -1, 0), *np.moveaxis(b, -1, 0))
    return np.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], axis=-1)


def _solve(J_SND: Array, r_SN: Array, w_SN: Array) -> Array:
    """Weighted least squares (S,D) of J d = r, slightly damped so that a step without tracks gives zeros."""
    weighted = (J_SND * w_SN[..., None]).swapaxes(-1, -2)
    normal = weighted @ J_SND
    damp = 1e-6 * np.trace(normal, axis1=-2, axis2=-1)[:, None, None] + 1e-12
    return np.linalg.solve(normal + damp * np.eye(J_SND.shape[-1]), weighted @ r_SN[..., None])[..., 0]


def _rotation_only(f1: Array, f2: Array, w: Array, focal: Array) -> Array:
    """Rotations (S,3,3) that alone explain the tracks best: reweighted, from a coarse to a fine scale."""
    R = np.tile(np.eye(3), (len(f1), 1, 1))
    for step in range(8):
        g = f2 @ R.swapaxes(-1, -2)
        x, y = g[..., 0] / g[..., 2], g[..., 1] / g[..., 2]
        error = np.stack([f1[..., 0] - x, f1[..., 1] - y], axis=1) * focal[:, :, None]
        scale = max(1.0, 8.0 / 2**step)
        robust = w / (1 + (error**2).sum(1) / scale**2)
        J_x = np.stack([-x * y, 1 + x * x, -y], axis=-1) * focal[:, None, :1]
        J_y = np.stack([-1 - y * y, x * y, x], axis=-1) * focal[:, None, 1:]
        J, e = np.concatenate([J_x, J_y], axis=1), np.concatenate([error[:, 0], error[:, 1]], axis=1)
        R = Rotation.from_rotvec(_solve(J, e, np.concatenate([robust, robust], axis=1))).as_matrix() @ R
    return R


def _epipolar(f1: Array, g: Array, t: Array, focal: Array) -> tuple[Array, Array]:
    """Pixel distance (S,N) of f1 from its epipolar line t x g, and the divisor that made it pixels.

    The divisor has a floor: next to the epipole the line's direction is noise.
    """
    line = _cross(t[:, None, :], g)
    divisor = np.hypot(line[..., 0] / focal[:, :1], line[..., 1] / focal[:, 1:])
    divisor = np.maximum(divisor, 0.05 / focal[:, :1])
    return (f1 * line).sum(-1) / divisor, divisor


def _headings(count: int = 40) -> Array:
    """(count,3) unit vectors spread over the half sphere z > 0; the constraint does not see the sign."""
    i = np.arange(count) + 0.5
    z, turn = 1 - i / count, np.pi * (1 + 5**0.5) * i
    return np.stack([np.sqrt(1 - z * z) * np.cos(turn), np.sqrt(1 - z * z) * np.sin(turn), z], axis=-1)


def _starting_points(f1: Array, g: Array, w: Array, focal: Array) -> list[tuple[Array, Array]]:
    """The _STARTS cheapest headings (S,3), at least 28 degrees apart, with their rotation vectors (S,3)."""
    f1, g, w = f1[:, ::3], g[:, ::3], w[:, ::3]
    fan = _headings()
    costs, turns = [], []
    for t in fan:
        r, divisor = _epipolar(f1, g, t[None], focal)
        J = _cross(g, _cross(f1, t[None, None])) / divisor[..., None]
        left = r
        for scale in (1.0, 0.5, 0.5):
            turn = _solve(J, -r, w / (1 + (left / scale) ** 2))
            left = r + (J @ turn[..., None])[..., 0]
        costs.append((w * np.log1p((left / (2 * _NOISE_PX)) ** 2)).sum(1))
        turns.append(turn)
    cost_SK, turn_SK3 = np.stack(costs, axis=1), np.stack(turns, axis=1)
    near = np.abs(fan @ fan.T) > np.cos(np.deg2rad(28))
    every, starts = np.arange(len(w)), []
    for _ in range(_STARTS):
        pick = cost_SK.argmin(1)
        starts.append((fan[pick], turn_SK3[every, pick]))
        cost_SK = np.where(near[pick], np.inf, cost_SK)
    return starts


def _refine(f1: Array, f2: Array, w: Array, focal: Array, t: Array, R: Array) -> tuple[Array, Array, Array]:
    """Heading (S,3), rotation (S,3,3) and robust cost (S,) after eight reweighted Gauss-Newton steps."""
    for step in range(8):
        other = np.where(np.abs(t[:, 2:]) < 0.8, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
        e1 = _cross(t, other)
        e1 /= np.linalg.norm(e1, axis=-1, keepdims=True)
        tangent = np.stack([e1, _cross(t, e1)], axis=-1)
        g = f2 @ R.swapaxes(-1, -2)
        r, divisor = _epipolar(f1, g, t, focal)
        J = np.concatenate([_cross(g, _cross(f1, t[:, None])), _cross(g, f1) @ tangent], axis=-1)
        J = J / divisor[..., None]
        d = _solve(J, -r, w / (1 + (r / max(_NOISE_PX, 0.6**step)) ** 2))
        R = Rotation.from_rotvec(d[:, :3]).as_matrix() @ R
        t = t + (tangent @ np.clip(d[:, 3:], -0.4, 0.4)[..., None])[..., 0]
        t = t / np.linalg.norm(t, axis=-1, keepdims=True)
    r, _ = _epipolar(f1, f2 @ R.swapaxes(-1, -2), t, focal)
    return t, R, (w * np.log1p((r / (2 * _NOISE_PX)) ** 2)).sum(1)


def _weighted_median(x_SN: Array, w_SN: Array) -> Array:
    order = x_SN.argsort(1)
    x, total = np.take_along_axis(x_SN, order, 1), np.take_along_axis(w_SN, order, 1).cumsum(1)
    middle = (total < 0.5 * total[:, -1:]).sum(1).clip(0, x.shape[1] - 1)
    return np.take_along_axis(x, middle[:, None], 1)[:, 0]


def flow_rotation(frames_FHW3: ArrayLike, intrinsics: ArrayLike) -> FlowMotion:
    """Rotation and heading of each step of a video, see the module's text and `FlowMotion`.

    frames (F,H,W,3) uint8, F >= 2; intrinsics (4,) or (F,4), normalised. About half a second for 97 frames of
    128x96 on a core.
    """
    frames, k = np.asarray(frames_FHW3), np.asarray(intrinsics, dtype=np.float64)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(f"frames must be uint8 of shape (F, H, W, 3), F >= 2; got {frames.dtype} {frames.shape}")
    if k.shape not in ((4,), (len(frames), 4)) or not np.isfinite(k).all() or (k[..., :2] <= 0).any():
        raise ValueError(
            f"intrinsics must be finite (4,) or ({len(frames)}, 4), fx fy cx cy divided by image width and "
            f"height, focal lengths > 0; got shape {k.shape}"
        )
    k = np.broadcast_to(k, (len(frames), 4))
    start, end, w = _track(frames)
    size = np.array(frames.shape[2:0:-1], dtype=np.float64)
    one = np.ones((*w.shape, 1))
    k1, k2 = k[:-1, None], k[1:, None]
    f1 = np.concatenate([(start / size - k1[..., 2:]) / k1[..., :2], one], axis=-1)
    f2 = np.concatenate([(end / size - k2[..., 2:]) / k2[..., :2], one], axis=-1)
    focal = k[:-1, :2] * size
    R0 = _rotation_only(f1, f2, w, focal)
    best = np.full(len(w), np.inf)
    t, R = np.zeros((len(w), 3)), R0
    for heading, turn in _starting_points(f1, f2 @ R0.swapaxes(-1, -2), w, focal):
        t_new, R_new, cost = _refine(f1, f2, w, focal, heading, Rotation.from_rotvec(turn).as_matrix() @ R0)
        better = cost < best
        best = np.where(better, cost, best)
        t, R = np.where(better[:, None], t_new, t), np.where(better[:, None, None], R_new, R)
    g = f2 @ R.swapaxes(-1, -2)
    residual, _ = _epipolar(f1, g, t, focal)
    agreeing = w / (1 + (residual / _NOISE_PX) ** 2)
    parallax = (g / g[..., 2:] - f1)[..., :2] * focal[:, None]
    # Things in front of the camera move against its heading: that gives the sign.
    against = (f1[..., :2] * t[:, None, 2:] - t[:, None, :2]) * focal[:, None]
    against /= np.maximum(np.linalg.norm(against, axis=-1, keepdims=True), 1e-3)
    t = np.where((agreeing * (parallax * against).sum(-1)).sum(1, keepdims=True) < 0, -t, t)
    parallax_px = _weighted_median(np.linalg.norm(parallax, axis=-1), agreeing)
    reliable = agreeing.sum(1) >= max(15.0, _MIN_SHARE * w.shape[1])
    still = reliable & (parallax_px < _STILL_PX)
    t = np.where((reliable & ~still)[:, None], t, np.nan)
    return FlowMotion(Rotation.from_matrix(R).as_rotvec(), t, parallax_px, reliable, still)


def score_motion(found: FlowMotion, c2w_F44: ArrayLike) -> dict[str, float]:
    """How well a video's motion follows commanded cameras c2w (F,4,4) in metres, whatever the first pose.

    rot_step_mean_deg: mean angle between estimated and commanded rotation, a frame, over reliable steps; _imputed_:
    unreliable steps count as no motion. heading_mean_deg: mean angle between the directions of translation over
    reliable steps where the command moves (over 5 mm and a fifth of the path's fast steps), a still video counting as
    90; _imputed_: unreliable steps at 90 too. coverage: share of reliable steps. NaN where nothing qualifies.
    """
    c2w, ok = np.asarray(c2w_F44, dtype=np.float64), found.reliable
    if c2w.shape != (len(ok) + 1, 4, 4):
        raise ValueError(f"c2w must be of shape ({len(ok) + 1}, 4, 4), one a frame; got {c2w.shape}")
    steps = np.linalg.inv(c2w[:-1]) @ c2w[1:]
    turn, move = Rotation.from_matrix(steps[:, :3, :3]), steps[:, :3, 3]
    error = np.rad2deg((Rotation.from_rotvec(found.rotation).inv() * turn).magnitude())
    length = np.linalg.norm(move, axis=-1)
    commanded = length > max(_COMMAND_METRES, 0.2 * np.quantile(length, 0.9))
    cosine = (found.heading * move).sum(-1) / np.maximum(length, 1e-12)
    heading = np.rad2deg(np.arccos(np.clip(np.where(np.isnan(cosine), 0.0, cosine), -1, 1)))

    def mean(x: Array, where: NDArray[np.bool_]) -> float:
        return float(x[where].mean()) if where.any() else float("nan")

    return {
        "rot_step_mean_deg": mean(error, ok),
        "rot_step_imputed_deg": float(np.where(ok, error, np.rad2deg(turn.magnitude())).mean()),
        "heading_mean_deg": mean(heading, ok & commanded),
        "heading_imputed_deg": mean(heading, commanded),
        "coverage": found.coverage,
    }
