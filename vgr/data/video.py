"""Clips in memory, and video and image files: local regular files only, nothing that could reach the network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Clip:
    """What a source hands over: frames (F,H,W,3) uint8, c2w (F,4,4) and intrinsics (F,4) float64, fps.

    shots: [{"start", "end", "caption"}] over raw frames; source: where it comes from; depth (F,H,W) float32
    planar metres where the source was asked for it.
    """

    frames: np.ndarray
    c2w: np.ndarray
    intrinsics: np.ndarray
    fps: float
    shots: list[dict[str, Any]]
    source: dict[str, Any] = field(default_factory=dict)
    depth: np.ndarray | None = None
