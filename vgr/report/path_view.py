"""A video beside its camera path seen from above."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vgr.report.sets import Frames

_PAPER, _FAINT, _INK, _ACCENT = (250, 249, 246), (198, 196, 190), (60, 62, 66), (30, 110, 170)


def beside_path(frames_FHW3: Frames, c2w_F44: NDArray[np.float64], intrinsics_F4: NDArray[np.float64]) -> Frames:
    """Frames enlarged without smoothing, right of them the path from above (x right, forward up) with the camera
    and its field of view at each moment; (F,H',W',3) uint8 with even sides."""
    height = frames_FHW3.shape[1]
    factor = max(1, math.ceil(288 / height))
    left = frames_FHW3.repeat(factor, 1).repeat(factor, 2)
    side = left.shape[1]
    right = np.stack([_panel(c2w_F44, intrinsics_F4, i, side) for i in range(len(frames_FHW3))])
    both = np.concatenate([left, right], axis=2)
    return np.ascontiguousarray(both[:, : both.shape[1] // 2 * 2, : both.shape[2] // 2 * 2])


def _panel(c2w: NDArray[np.float64], intrinsics: NDArray[np.float64], now: int, side: int) -> NDArray[np.uint8]:
    import cv2

    plan = c2w[:, [0, 2], 3]
    low, high = plan.min(0), plan.max(0)
    span = max(float((high - low).max()), 1.0)  # a turn on the spot still wants a frame around it
    scale = 0.62 * side / span

    def at(points: NDArray[np.float64]) -> NDArray[np.int32]:
        """Right and forward in metres to the fixed point with 4 bits that cv2 takes."""
        return (16 * (side / 2 + (points - (low + high) / 2) * scale * (1, -1))).astype(np.int32)

    image = np.full((side, side, 3), _PAPER, np.uint8)
    line, here = at(plan), at(plan[now])
    cv2.polylines(image, [line], False, _FAINT, 2, cv2.LINE_AA, 4)
    cv2.polylines(image, [line[: now + 1]], False, _ACCENT, 3, cv2.LINE_AA, 4)
    fx, _, cx, _ = intrinsics[now]
    edges = np.array([[-cx / fx, 0.0, 1.0], [(1 - cx) / fx, 0.0, 1.0]]) @ c2w[now, :3, :3].T
    view = np.stack([here, *at(plan[now] + 0.16 * span * edges[:, [0, 2]])])
    cv2.fillPoly(image, [view], (214, 228, 240), cv2.LINE_AA, 4)
    cv2.polylines(image, [view], True, _ACCENT, 1, cv2.LINE_AA, 4)
    cv2.circle(image, here.tolist(), 16 * 4, _INK, -1, cv2.LINE_AA, 4)
    bar = 10.0 ** math.floor(math.log10(0.4 * span))
    start, end = int(side * 0.06), int(side * 0.06 + bar * scale)
    cv2.line(image, (start, side - 14), (end, side - 14), _INK, 2)
    cv2.putText(image, f"{bar:g} m", (end + 6, side - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.4, _INK, 1, cv2.LINE_AA)
    return image
