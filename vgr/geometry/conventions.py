"""Do cameras belong to their frames? Misread pose files look plausible (specs/benchmarks 4.4): the pictures tell.

Corners are tracked (Lucas-Kanade, forward and back) between frames far enough apart to move. Where a point can go is
the half of its epipolar line on which it lies in front of the camera; the error is how far from there it went, in
pixels of a picture 640 wide, the median over a pair's tracks. Unlike the Sampson error it also tells a path run
backwards, whose epipolar lines are the same. The cameras as given are held against the usual misreadings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.geometry.alignment import turn_between
from vgr.types import Cameras

Array = NDArray[np.float64]

_WIDTH = 640  # errors are those of a picture so wide
_PAIRS, _CORNERS = 12, 400
_APART = 0.02  # of the width: the least median motion of a pair
_PARALLAX_PX = 1.5  # least median motion that no turn explains; below, translation cannot be judged
_BAD_PX = 3.0  # error beyond which cameras are not those of the frames
_BETTER = 0.7  # a reading whose error is below this share of the given one's is the likelier one
_NOISE_PX = 0.2  # of tracking alone


def _flip(*signs: float) -> Callable[[Array], Array]:
    sign = np.array([*signs, 1.0])
    return lambda c2w: c2w * sign[:, None] * sign


def _transposed(c2w: Array) -> Array:
    turned = c2w.copy()
    turned[:, :3, :3] = c2w[:, :3, :3].swapaxes(1, 2)
    return turned


#: what c2w (F,4,4) would have to become if the file was read wrongly
READINGS: dict[str, Callable[[Array], Array]] = {
    "as given": lambda c2w: c2w,
    "inverted (world-to-camera taken for camera-to-world)": np.linalg.inv,
    "OpenGL axes (y up, looking along -z)": lambda c2w: c2w * (1.0, -1.0, -1.0, 1.0),
    "rotations transposed": _transposed,
    "rows one frame late": lambda c2w: np.concatenate([c2w[1:], c2w[-1:]]),
    "rows one frame early": lambda c2w: np.concatenate([c2w[:1], c2w[:-1]]),
    "mirrored in x": _flip(-1, 1, 1),
    "mirrored in y (left-handed, y up)": _flip(1, -1, 1),
    "mirrored in z": _flip(1, 1, -1),
}


@dataclass(frozen=True)
class ConventionReport:
    """What the frames say of their cameras.

    verdict: "agrees", or "undecidable" where too little can be tracked or nothing but turns is to be seen: then no
    reading of the translations is told from another. errors_px: by reading. undecided: readings that explain this clip
    about as well (a path without turns is its own transpose). parallax_px: motion that no turn explains; pairs: of
    frames that were compared.
    """

    verdict: str
    errors_px: dict[str, float]
    undecided: tuple[str, ...]
    parallax_px: float
    pairs: int


def check_convention(frames_FHW3: ArrayLike, cameras: Cameras) -> ConventionReport:
    """Hold the first video of cameras (B,F), OpenCV camera-to-world, against its frames (F,H,W,3) uint8, F >= 2.

    ValueError, with the figures, where another of READINGS explains the frames clearly better (it is named), or where
    the given one is more than 3 pixels off and no other is better: poses of other frames, wrong intrinsics, or hardly
    anything that stands still. About a second for a clip of 640x480.
    """
    frames = np.asarray(frames_FHW3)
    c2w, k = (x[0].double().cpu().numpy() for x in (cameras.c2w, cameras.intrinsics))
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(f"frames must be uint8 of shape (F, H, W, 3), F >= 2; got {frames.dtype} {frames.shape}")
    if len(c2w) != len(frames) or not (np.isfinite(c2w).all() and np.isfinite(k).all()):
        raise ValueError(
            f"{len(c2w)} cameras for {len(frames)} frames; as many are needed, with finite poses and intrinsics"
        )
    found = _pairs(frames, k)
    if not found:
        return ConventionReport("undecidable", {}, tuple(READINGS), 0.0, 0)
    poses = [read(c2w) for read in READINGS.values()]
    pixels = np.array([1.0, frames.shape[1] / frames.shape[2]]) * _WIDTH
    off = [[epipolar_px(np.linalg.inv(pose[j]) @ pose[i], *track, k[i], k[j], pixels) for i, j, track, _ in found]
           for pose in poses]  # fmt: skip
    errors_RP = np.array([[np.median(np.nan_to_num(px, nan=_WIDTH)) for px in row] for row in off])
    errors_R = np.median(errors_RP, axis=1)
    told = dict(zip(READINGS, errors_R.tolist()))
    figures = ", ".join(f"{name}: {px:.2f}" for name, px in told.items())
    better = ((errors_R + _NOISE_PX) < _BETTER * (errors_R[0] + _NOISE_PX)) & (
        (errors_RP < errors_RP[0]).mean(axis=1) >= 0.75
    )
    if better.any():
        likely = list(READINGS)[int(np.where(better, errors_R, np.inf).argmin())]
        raise ValueError(f"the cameras do not fit their frames; they would, {likely}. Errors in pixels: {figures}")
    if errors_R[0] > _BAD_PX:
        raise ValueError(f"the cameras do not fit their frames under any reading. Errors in pixels: {figures}")
    parallax = float(np.quantile([parallax for *_, parallax in found], 0.75))
    same = (errors_R + _NOISE_PX) * _BETTER <= errors_R[0] + _NOISE_PX
    undecided = tuple(name for name, s in zip(READINGS, same) if s and name != "as given")
    verdict = "agrees" if parallax >= _PARALLAX_PX else "undecidable"
    return ConventionReport(verdict, told, undecided, parallax, len(found))


def _pairs(frames: NDArray[np.uint8], k: Array) -> list[tuple[int, int, tuple[Array, Array], float]]:
    """Up to _PAIRS pairs i, j of frames, their tracks (starts and ends (N,2), normalised) and parallax in pixels."""
    import cv2

    height, width = frames.shape[1:3]
    up = 2 if width < 200 else 1  # tracking small pictures is more exact at twice their size
    size = (width * up, height * up)
    grey: dict[int, NDArray[np.uint8]] = {}

    def picture(i: int) -> NDArray[np.uint8]:
        if i not in grey:
            grey[i] = cv2.resize(cv2.cvtColor(np.ascontiguousarray(frames[i]), cv2.COLOR_RGB2GRAY), size,
                                 interpolation=cv2.INTER_CUBIC)  # fmt: skip
        return grey[i]

    found = []
    for i in np.unique(np.linspace(0, len(frames) - 2, _PAIRS).astype(int)).tolist():
        corners = cv2.goodFeaturesToTrack(picture(i), _CORNERS, 0.01, max(4, size[0] // 60))
        best, gap = None, 1
        while corners is not None and i + gap < len(frames):
            start, end = _track(picture(i), picture(i + gap), corners)
            if len(start) < max(20, 0.3 * len(corners)):
                break
            start, end = start / size, end / size
            best = (i, i + gap, (start, end), _parallax(start, end, k[i], k[i + gap]))
            moved = float(np.median(np.linalg.norm(end - start, axis=1)))
            if best[3] > 2 * _PARALLAX_PX and moved > _APART:
                break
            gap *= 2
        if best is not None:
            found.append(best)
    return found


def _track(a: NDArray[np.uint8], b: NDArray[np.uint8], corners: NDArray[np.float32]) -> tuple[Array, Array]:
    """Starts and ends (N,2), in pixels from the image's edges, of corners that come back to where they started."""
    import cv2

    options = dict(winSize=(15, 15), maxLevel=4, criteria=(3, 20, 0.01))
    to, ok, _ = cv2.calcOpticalFlowPyrLK(a, b, corners, None, **options)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(b, a, to, None, **options)
    p, q, r = (x.reshape(-1, 2).astype(np.float64) for x in (corners, to, back))
    inside = ((q >= 0) & (q < (a.shape[1], a.shape[0]))).all(axis=1)
    good = inside & (ok.ravel() > 0) & (returned.ravel() > 0) & (np.linalg.norm(r - p, axis=1) < 0.5)
    return p[good] + 0.5, q[good] + 0.5


def _rays(points_N2: Array, k: Array) -> Array:
    return np.concatenate([(points_N2 - k[2:]) / k[:2], np.ones((len(points_N2), 1))], axis=1)


def _parallax(start: Array, end: Array, k1: Array, k2: Array) -> float:
    a, b = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in (_rays(start, k1), _rays(end, k2)))
    return turn_between(a, b, _WIDTH * float(k2[0]))[1]


def epipolar_px(relative_44: Array, start: Array, end: Array, k1: Array, k2: Array, pixels_2: Array) -> Array:
    """Distances (N,) of ends from where points in front of the first camera could have gone, in pixels; NaN: nowhere.

    start, end (N,2), intrinsics (4,) normalised; relative_44: from the first camera's frame to the second's; pixels_2:
    width and height of the picture."""
    ray = _rays(start, k1) @ relative_44[:3, :3].T
    x, y, z = np.where(ray[:, 2] > 1e-3, ray.T, np.nan)
    tx, ty, tz = relative_44[:3, 3]
    # At infinity a point goes to ray / z; nearer ones go from there along the image of the translation.
    off = (end - (np.stack([x / z, y / z], axis=1) * k2[:2] + k2[2:])) * pixels_2
    way = np.stack([tx * z - tz * x, ty * z - tz * y], axis=1) * k2[:2] * pixels_2
    way /= np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-12)
    along = np.maximum((off * way).sum(axis=1, keepdims=True), 0.0)
    return np.linalg.norm(off - along * way, axis=1)
