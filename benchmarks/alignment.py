"""Where was the camera that made these frames? By direct alignment with the first one, whose depth is exact.

Tiny models make blurred pictures, in which flow and features find nothing or standing still. What is left of a picture
still says where its first frame went: each frame's pose is the one under which the first frame's surface, seen from
there, differs least from it. Gauss-Newton over six unknowns, from coarse pictures to fine ones, with Cauchy weights, so
that what is wrong or hidden loses its say, and a weak wish for small steps. Depth gives the scale. A frame is sought
from where the last one was, from one step on, from the start and, where that is given, from where the camera was told
to be: the least cost wins. It is no benchmark metric: it needs exact depth, and says little of frames in which less
than half of the first one is left in view.

Bars of what it finds are in its tests; what is left of an engine's true walks, `relit`, is a row of
`benchmarks.warp_adapter`.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

Array, Frame, Mask = NDArray[np.float64], NDArray[np.uint8], NDArray[np.bool_]

# How much smaller, how many steps there, and a difference that is nothing strange: of 1, or of a neighbourhood's usual.
_LEVELS = ((4, 15, (0.2, 1.3)), (2, 15, (0.2, 1.3)), (1, 15, (0.2, 1.3)), (1, 15, (0.05, 0.4)))
_AROUND, _FLAT = 6.0, 0.03  # pixels of a neighbourhood; a contrast (of 1) below which it is flat
_LEAST = 0.1  # of the first frame's pixels that have to be seen
_DAMP = 1e-3
_TURN, _WAY, _WISH = np.radians(3.0), 0.05, 0.003  # a usual step: radians, and median depths; what the wish weighs


class _Level:
    """The first frame at one size: points (N,3) of pixels whose depth is known and used, their colours (N,3)."""

    def __init__(
        self, frame_HW3: Frame, depth_HW: Array, k_4: Array, factor: int, noise: float, relit: bool, used_HW: Mask
    ) -> None:
        height, width = (n // factor for n in depth_HW.shape)
        self.size, self.noise, self.relit = (height, width), noise, relit
        self.scale, self.centre = k_4[:2] * (width, height), k_4[2:] * (width, height) - 0.5
        # A cell's depth is that of one pixel in it, so its point and colour are that pixel's too.
        place = np.s_[factor // 2 :: factor, factor // 2 :: factor]
        depth, used = (x[place][:height, :width] for x in (depth_HW, used_HW))
        y, x = (np.indices((height, width)) * factor + factor // 2 + 0.5) / factor - 0.5
        at = x.astype(np.float32), y.astype(np.float32)
        colours = cv2.remap(self.picture(frame_HW3), *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        keep = used & np.isfinite(depth) & (depth > 0)
        rays = np.stack([*(np.stack([x, y]) - self.centre[:, None, None]) / self.scale[:, None, None], np.ones_like(x)])
        self.points, self.colours = (rays * depth)[:, keep].T, colours[keep].astype(np.float64)
        self.median = float(np.median(depth[keep]))

    def picture(self, frame_HW3: Frame) -> NDArray[np.float32]:
        """A frame at this size, a little smoothed; relit: as deviations from its neighbourhood in units of theirs."""
        small = cv2.resize(frame_HW3, self.size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        smooth = cv2.GaussianBlur(small, (0, 0), 1.0)
        if not self.relit:
            return smooth
        own = smooth - cv2.GaussianBlur(small, (0, 0), _AROUND)
        usual = np.sqrt(cv2.GaussianBlur((own**2).mean(2), (0, 0), _AROUND)) + _FLAT
        return own / usual[..., None]

    def gradients(self, picture: NDArray[np.float32]) -> NDArray[np.float32]:
        """Slopes (H,W,6), three colours along x and along y, a pixel."""
        return np.concatenate([cv2.Scharr(picture, cv2.CV_32F, *d, scale=1 / 32) for d in ((1, 0), (0, 1))], axis=2)


def track(
    frames_FHW3: NDArray[np.uint8], depth_HW: ArrayLike, intrinsics_4: ArrayLike,
    mask_HW: Mask | None = None, told_F44: ArrayLike | None = None, *,
    relit: bool = False,
) -> Array:  # fmt: skip
    """Poses c2w (F,4,4) of frames relative to the first, in the unit of its planar depth (0 or not finite: unknown).

    intrinsics (4,): normalised, of all frames. mask: pixels of the first frame that are left out, of moving things say;
    what moves later into view weighs little. told (F,4,4): c2w the camera was told, another start. relit: light falls
    with the way to a surface, as engines have it, so a neighbourhood's light and contrast are taken out of it, which
    costs exactness at borders. A frame that shows too little of the first keeps the pose before. ValueError for shapes
    that do not match.
    """
    frames, depth, k = np.asarray(frames_FHW3), np.asarray(depth_HW, np.float64), np.asarray(intrinsics_4, np.float64)
    if frames.ndim != 4 or frames.dtype != np.uint8 or depth.shape != frames.shape[1:3] or k.shape != (4,):
        raise ValueError(f"frames (F,H,W,3) uint8 want depth (H,W) and intrinsics (4,); got {frames.dtype} "
                         f"{frames.shape}, {depth.shape} and {k.shape}")  # fmt: skip
    used = np.ones(depth.shape, bool) if mask_HW is None else ~mask_HW
    levels = [(_Level(frames[0], depth, k, factor, noise[relit], relit, used), n) for factor, n, noise in _LEVELS]
    w2c, told = [np.eye(4)], None if told_F44 is None else np.asarray(told_F44, np.float64)
    if told is not None and told.shape != (len(frames), 4, 4):
        raise ValueError(f"{len(frames)} frames want as many poses they were told, (F,4,4); got {told.shape}")
    for number, frame in enumerate(frames[1:], 1):
        starts = [w2c[-1], w2c[0]]
        if number > 1:
            starts.append(w2c[-1] @ np.linalg.inv(w2c[-2]) @ w2c[-1])
        if told is not None:
            starts.append(np.linalg.inv(told[number]) @ told[0])
        w2c.append(_align(levels, frame, starts))
    return np.linalg.inv(np.stack(w2c))


def _align(levels: list[tuple[_Level, int]], frame: NDArray[np.uint8], starts: list[Array]) -> Array:
    found = starts
    for level, steps in levels:
        picture = level.picture(frame)
        both = np.concatenate([picture, level.gradients(picture)], axis=2)
        tried = [_refine(level, both, start, starts[0], steps) for start in found]
        best = min(tried, key=lambda one: one[1])
        found = [best[0]] if np.isfinite(best[1]) else starts[:1]
    return found[0]


def _refine(
    level: _Level, picture_HW9: NDArray[np.float32], start: Array, before: Array, steps: int
) -> tuple[Array, float]:
    """The pose w2c next to `start` that fits best, and its cost; infinite where too little is seen."""
    pose, damp = start, _DAMP
    cost, told = _terms(level, picture_HW9, pose, before)
    for _ in range(steps):
        if told is None:
            break
        normal, slope = told
        step = -np.linalg.solve(normal + damp * np.diag(np.diag(normal)), slope)
        move = np.eye(4)
        move[:3, :3], move[:3, 3] = Rotation.from_rotvec(step[:3]).as_matrix(), step[3:]
        found, following = _terms(level, picture_HW9, move @ pose, before)
        if found >= cost:
            damp *= 10
            if damp > 1e2:
                break
            continue
        gained = 1 - found / cost
        pose, cost, told, damp = move @ pose, found, following, max(damp / 10, 1e-6)
        if gained < 1e-5:
            break
    return pose, cost


def _terms(
    level: _Level, picture_HW9: NDArray[np.float32], w2c: Array, before: Array
) -> tuple[float, tuple[Array, Array] | None]:
    """Robust cost a pixel, with the wish to be near the pose `before`, and its normal matrix (6,6) and slope (6,)."""
    X = level.points @ w2c[:3, :3].T + w2c[:3, 3]
    z = np.maximum(X[:, 2], 1e-6)
    x, y = (X[:, i] / z * level.scale[i] + level.centre[i] for i in range(2))
    height, width = level.size
    inside = (X[:, 2] > 1e-3) & (x >= 0) & (y >= 0) & (x <= width - 1) & (y <= height - 1)
    if inside.sum() < max(_LEAST * height * width, 16):
        return np.inf, None
    X, x, y, z, colours = X[inside], x[inside], y[inside], z[inside], level.colours[inside]
    read = cv2.remap(picture_HW9, x.astype(np.float32)[None], y.astype(np.float32)[None], cv2.INTER_LINEAR)[0]
    r = read[:, :3].astype(np.float64) - colours
    weight = 1 / (1 + (r / level.noise) ** 2)
    u, v, a, b = level.scale[0] / z, level.scale[1] / z, X[:, 0] / z, X[:, 1] / z
    zero = np.zeros_like(z)
    J_x = np.stack([-a * b * z * u, (1 + a * a) * z * u, -b * z * u, u, zero, -a * u], axis=1)
    J_y = np.stack([-(1 + b * b) * z * v, a * b * z * v, a * z * v, zero, v, -b * v], axis=1)
    slopes = read[:, 3:].astype(np.float64)
    J = (slopes[:, :3, None] * J_x[:, None] + slopes[:, 3:, None] * J_y[:, None]).reshape(-1, 6)
    weighted = (J * weight.reshape(-1, 1)).T / (level.noise**2 * r.size)
    usual = np.repeat([_TURN, _WAY * level.median], 3)
    moved = w2c @ np.linalg.inv(before)
    gone = np.concatenate([Rotation.from_matrix(moved[:3, :3]).as_rotvec(), moved[:3, 3]]) / usual
    cost = np.log1p((r / level.noise) ** 2).mean() + _WISH * (gone**2).sum()
    normal = weighted @ J + _WISH * np.diag(usual**-2.0)
    return float(cost), (normal, weighted @ r.ravel() + _WISH * gone / usual)


def pose_errors(made_F44: ArrayLike, true_F44: ArrayLike) -> dict[str, float]:
    """Means over the frames behind the first, both paths relative to it: "align_rot_deg", "align_trans_m".

    The second is in the paths' own unit and without any fit of scale. ValueError for paths of other lengths.
    """
    made, true = np.asarray(made_F44, np.float64), np.asarray(true_F44, np.float64)
    if made.shape != true.shape or made.ndim != 3 or made.shape[1:] != (4, 4) or len(made) < 2:
        raise ValueError(f"two paths (F,4,4) of 2 frames or more are compared; got {made.shape} and {true.shape}")
    made, true = (np.linalg.inv(path[0]) @ path for path in (made, true))
    turn = Rotation.from_matrix(made[1:, :3, :3].swapaxes(1, 2) @ true[1:, :3, :3]).magnitude()
    off = np.linalg.norm(made[1:, :3, 3] - true[1:, :3, 3], axis=1)
    return {"align_rot_deg": float(np.degrees(turn).mean()), "align_trans_m": float(off.mean())}
