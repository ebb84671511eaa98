"""A camera path by a model that knows no cameras: its past, warped along the path, is its evidence (vgr-sample depth=).

Specs/warp-adapter 2 and 4.1. With adapters' weights, or without any training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from vgr.generator import Generator
    from vgr.types import Cameras

DepthOf = Callable[[np.ndarray], np.ndarray]  # frames (F,H,W,3) uint8 to planar depth (F,H,W)


def check(
    generator: Generator, image: np.ndarray | None, depth: str | None, path: str | None, moving: str
) -> None:
    """ValueError for a depth that the model has no use for or misses, before anything is made."""
    from vgr.models.warp_adapter import MOVING

    if moving not in MOVING:
        raise ValueError(f"moving={moving}: choose {', '.join(MOVING)}")
    if depth is None and not generator.takes_cameras and path != "static":
        raise ValueError(f"{generator.name} knows no cameras: give depth=<folder of a metric depth network>, and its "
                         "past is warped along the path, or path=static")  # fmt: skip
    if depth is None:
        return
    if generator.takes_cameras or not getattr(generator.model, "takes_history", False):
        raise ValueError(f"depth={depth}: {generator.name} follows cameras by itself; leave depth out")
    if image is None:
        raise ValueError(f"depth={depth} is that of the frames that are warped: give a first_frame to begin with")


def in_units_of_depth(cameras: Cameras, depth_HW: Tensor) -> Cameras:
    """The path with one unit of length being the median depth of the first frame (6.2)."""
    from vgr.geometry.warp import median_depth
    from vgr.types import Cameras

    c2w = cameras.c2w.clone()
    c2w[..., :3, 3] *= median_depth(depth_HW)
    return Cameras(c2w, cameras.intrinsics)


def follow(
    generator: Generator, image: np.ndarray, cameras: Cameras, prompt: str, seed: int, depth_of: DepthOf,
    moving: str = "drop", progress: Callable[[int], None] = lambda chunk: None,
    watch: Callable[[np.ndarray], None] = lambda frames: None,
) -> np.ndarray:  # fmt: skip
    """Frames (F,H,W,3) uint8 from the image (H,W,3) along cameras (1,F), in the unit of depth_of.

    moving: `vgr.models.warp_adapter.WarpEvidence`'s. progress hears of each chunk, watch of its frames.
    """
    import torch

    from vgr.models.warp_adapter import WarpEvidence
    from vgr.types import Cameras

    unit, frames = generator.chunk * generator.stride, cameras.c2w.shape[1]
    if generator.codec.clip is None:
        seconds = max(1, -(-(frames - 1) // unit)) * unit / generator.fps
        rest = round(seconds * generator.fps) + 1 - frames  # the path rests at its end until the last chunk is full
    else:
        rest = generator.whole(frames) - frames
        seconds = (frames + rest) / generator.fps
    both = cameras.c2w, cameras.intrinsics
    c2w, k = (torch.cat([x, x[:, -1:].expand(-1, rest, *x.shape[2:])], dim=1) for x in both)
    evidence = WarpEvidence(
        Cameras(c2w, k), lambda shown, _: torch.from_numpy(depth_of(shown[None].numpy())[0]), generator.codec,
        seed=seed, moving=moving, **generator.evidence,
    )  # fmt: skip
    session, made = generator.session(seed, image, evidence=evidence), []
    session.append(prompt, seconds)
    with torch.autocast(generator.device, torch.bfloat16, enabled=generator.device == "cuda"):
        for number, piece in enumerate(session.frames()):
            made.append(piece.numpy())
            watch(made[-1])
            progress(number)
    return np.concatenate(made)[:frames]
