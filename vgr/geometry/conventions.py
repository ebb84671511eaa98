"""Do cameras belong to the frames they came with? Pose files misread look plausible (specs/benchmarks 4.4): pictures tell.

Corners are tracked (Lucas-Kanade, forward and back) between frames far enough apart to move. Where a point can go is
the half of its epipolar line on which it lies in front of the camera; the error is how far from there it went, in
pixels of a picture 640 wide, the median over a pair's tracks. Unlike the Sampson error it also tells a path run backwards,
whose epipolar lines are the same. The cameras as given are held against the usual misreadings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vgr.types import Cameras

Array = NDArray[np.float64]

_WIDTH = 640  # errors are those of a picture so wide
_PAIRS, _CORNERS = 12, 400
_APART = 0.02  # of the width: the least median motion of a pair
_PARALLAX_PX = 1.5  # least median motion that no turn explains; below, translation cannot be judged
_BAD_PX = 3.0  # error beyond which cameras are not those of the frames
_BETTER = 0.6  # a reading whose error is below this share of the given one's is the likelier one
_NOISE_PX = 0.5  # tracking alone; smaller errors are not told apart


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
