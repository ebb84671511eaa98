"""Cameras from the frames of one shot: structure from motion without weights (specs/world-model 8, benchmarks 4.3).

SIFT, matched with the next five frames where the picture's motion leads (`vgr.geometry.features`), and pycolmap, one
pinhole camera. Frames 8 or 16 apart are not matched: where textures repeat, as in a game's, more than half of such
matches are of another tile; of the nearer pairs those go that the frames between contradict. Mapped globally, and also
incrementally where that leaves frames out or matches of neighbouring frames unexplained: the two go wrong on different
walks. Where both do, from frames at most two and three apart. The better cameras are taken, and refused if they leave
many unexplained. Frames that only turn, where no translation can be seen, get rotations from the matches alone: the
turn between two frames that best carries unit bearings onto each other, reweighted, and all turns of the shot made
consistent by their spectral average.
Half a second a frame of 640x480 by one core, a second where both mappers are asked: hand long shots in as every n-th
frame and put `vgr.geometry.cameras.interpolate` between.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh
from scipy.optimize import minimize_scalar
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from vgr.geometry.alignment import rotation_mean, turn_between
from vgr.geometry.cameras import fov_deg, from_fov, interpolate
from vgr.geometry.checks import FOV_DEG
from vgr.geometry.conventions import Array
from vgr.geometry.mapping import ALONE, OVERLAP, map_frames, match_frames
from vgr.geometry.matches import Pairs, explained

if TYPE_CHECKING:
    import pycolmap

MAPPERS = ("global", "incremental")
_THEN = (("global", 2), ("incremental", 3))  # and how far apart frames may be, where no way brought right cameras
SCALE_SPREAD = 2.0  # of the metres of a unit from frame to frame, standard deviation over mean (world-model 8)
MIN_REGISTERED, MAX_REPROJECTION_PX = 0.5, 2.0
MAX_JUMP = 3.0  # change of a step, over the shot's fast steps; a frame placed wrongly goes there and back
# Right cameras of engine walks agree by 0.67 (much sky, which goes with the eye) to 0.96, most wrong ones by 0.63 at
# most, but 0.74 was seen: between the limits only what both mappers tell alike is taken, unless one of them is refused
# by itself.
MIN_AGREEMENT, _SURE, MAX_APART_DEG = 0.65, 0.8, 1.0
_TURNED_PX = 0.6  # what is left of the matches' motion, turns taken out, where nothing but turns is to be seen
_NEARLY_TURNED_PX = 3.0  # the same where mapping failed


@dataclass(frozen=True)
class Reconstruction:
    """What the frames tell of their cameras.

    c2w (F,4,4) float64, OpenCV axes, relative to the first frame that is registered; NaN for frames that are not.
    intrinsics (4,) normalised, given or estimated. The unit is the median depth of the sparse points, or metres where
    `metric`. motion: "structure"; "rotation" where no translation can be seen (it is 0); "none" where nothing was
    found. registered: share of frames; reprojection_px: mean over sparse points (rotation: median residual of the
    matches). confidence: 0 to 1, registered share times how much of the structure is seen under a wide enough angle.
    points (N,3): sparse points in the cameras' frame. reason: why the cameras should not be used; "" where they can be.
    agreement: share of matches that the cameras explain between the two neighbouring frames where it is least.
    """

    c2w: Array
    intrinsics: Array
    motion: str
    registered: float
    reprojection_px: float
    confidence: float
    points: Array
    metric: bool
    reason: str
    agreement: float = math.nan


def reconstruct(
    frames_FHW3: ArrayLike, intrinsics: ArrayLike | None = None, *, mapper: str = "global",
    depth_m: float | ArrayLike | None = None, seed: int = 0,
) -> Reconstruction:
    """Cameras of one shot, frames (F,H,W,3) uint8, F >= 2.

    intrinsics (4,), normalised: kept as they are; without them one focal length for square pixels and a centred axis
    is estimated (`vgr.data.video` gives frames whose pixels are square). mapper: the one of MAPPERS to ask first.
    depth_m gives metres: the median depth of what the shot shows, or planar depth maps (F,h,w) in metres of any size
    (0, negative or not finite: unknown). A failure is a result with a reason, never an error; ValueError is for
    arguments. Equal arguments give equal results: mapping keeps to one thread, since with two equal runs differ, and
    the OpenBLAS within pycolmap 4.2.1 is not made for it ("Bad memory unallocation").
    """
    frames, k, depth = _checked(frames_FHW3, intrinsics, mapper, depth_m)
    failed = Reconstruction(
        np.full((len(frames), 4, 4), np.nan), np.full(4, np.nan) if k is None else k, "none", 0.0, math.nan, 0.0,
        np.zeros((0, 3)), False, "",
    )
    with tempfile.TemporaryDirectory(prefix="vgr-poses-") as name:
        folder = Path(name)
        pairs = match_frames(folder, frames, k, seed)
        if not pairs:
            return replace(failed, reason="no two frames share enough features: too little texture, or too fast")
        turned, parallax_px = _rotations(pairs, failed, frames.shape[1:3])
        if parallax_px < _TURNED_PX:
            return _judged(turned)
        found: list[Reconstruction] = []
        ways = [(way, OVERLAP) for way in sorted(MAPPERS, key=lambda name: name != mapper)]
        for i, (way, overlap) in enumerate((*ways, *_THEN)):
            if i >= len(ways) and any(not one.reason for one in found):
                break
            with ALONE:
                model = map_frames(folder, way, overlap, k is None, seed, insist=parallax_px >= _NEARLY_TURNED_PX)
            if model is not None:
                found.append(_structure(model, failed, frames.shape[1:3], depth, pairs))
            if found and not found[-1].reason and found[-1].registered == 1 and found[-1].agreement >= _SURE:
                break
    best = max(found, key=lambda one: (not one.reason, one.registered * one.agreement), default=None)
    right = [one for one in found if not one.reason]
    if best is not None and len(right) == 2 and best.agreement < _SURE:
        a, b = (x.c2w[np.isfinite([y.c2w for y in right]).all((0, 2, 3)), :3, :3] for x in right)
        apart = np.rad2deg(Rotation.from_matrix((rotation_mean(a, b) @ a).swapaxes(1, 2) @ b).magnitude().mean())
        if not apart <= MAX_APART_DEG:
            best = replace(best, reason=f"two ways of mapping differ by {apart:.1f} degrees, and neither is sure")
    if (best is None or best.registered < MIN_REGISTERED) and parallax_px < _NEARLY_TURNED_PX:
        return _judged(turned)
    return best or replace(failed, reason=f"no structure was found from {parallax_px:.1f} pixels of parallax")


def estimate_cameras(
    frames_FHW3: NDArray[np.uint8], fps: float, intrinsics: ArrayLike | None = None,
    depth_of: Callable[[NDArray[np.uint8]], ArrayLike] | None = None,
) -> tuple[Array, Array, float]:
    """c2w (F,4,4), intrinsics (F,4) and confidence of one shot, from about eight frames a second and the last one.

    The frames between are interpolated. depth_of: frames to maps, for metres. ValueError with the reason where the
    cameras should not be used, and where a frame could not be registered.
    """
    count = len(frames_FHW3)
    at = np.union1d(np.arange(0, count, max(1, round(fps / 8))), [count - 1])
    depth_m = None if depth_of is None else depth_of(frames_FHW3[at])
    found = reconstruct(frames_FHW3[at], intrinsics, depth_m=depth_m)
    known = np.isfinite(found.c2w).all((1, 2))
    if found.reason or not known.all():
        raise ValueError(found.reason or f"{(~known).sum()} of {len(at)} frames could not be registered")
    c2w = interpolate(torch.from_numpy(found.c2w), torch.from_numpy(at), torch.arange(count)).numpy()
    return c2w, np.tile(found.intrinsics, (count, 1)), found.confidence


def _checked(
    frames: ArrayLike, intrinsics: ArrayLike | None, mapper: str, depth_m: float | ArrayLike | None
) -> tuple[NDArray[np.uint8], Array | None, Array | None]:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(f"frames must be uint8 of shape (F, H, W, 3), F >= 2; got {frames.dtype} {frames.shape}")
    if mapper not in MAPPERS:
        raise ValueError(f"unknown mapper {mapper!r}; known: {', '.join(MAPPERS)}")
    k = None if intrinsics is None else np.asarray(intrinsics, dtype=np.float64)
    if k is not None and (k.shape != (4,) or not np.isfinite(k).all() or (k[:2] <= 0).any()):
        raise ValueError(f"intrinsics must be finite (4,), fx fy cx cy divided by the image's size; got {k}")
    depth = None if depth_m is None else np.asarray(depth_m, dtype=np.float64)
    if depth is not None and not (
        (depth.ndim == 0 and 0 < depth < math.inf) or (depth.ndim == 3 and len(depth) == len(frames))
    ):
        raise ValueError(f"depth_m must be metres > 0 or maps ({len(frames)}, h, w); got {depth_m!r:.60}")
    return frames, k, depth


def _turns(pairs: Pairs, k: Array, size_hw: tuple[int, int]) -> tuple[dict[tuple[int, int], Array], Array]:
    """Rotations of all pairs and what each leaves of its matches' motion, in pixels (P,)."""
    scale = np.tile(size_hw[::-1], 2) * k
    turns, left = {}, []
    for pair, both in pairs.items():
        rays = [np.concatenate([(p - scale[2:]) / scale[:2], np.ones((len(p), 1))], axis=1) for p in both]
        a, b = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in rays)
        turns[pair], residual = turn_between(a, b, math.sqrt(scale[0] * scale[1]))
        left.append(residual)
    return turns, np.array(left)


def _rotations(pairs: Pairs, failed: Reconstruction, size_hw: tuple[int, int]) -> tuple[Reconstruction, float]:
    """Cameras that only turn, and the parallax that they leave unexplained: of nine pairs in ten it is less, pixels."""
    k = failed.intrinsics
    if np.isnan(k).any():

        def of(fov: float) -> Array:
            return from_fov(fov, size_hw[1] / size_hw[0], torch.float64).numpy()

        few = dict(list(pairs.items())[:: max(1, len(pairs) // 40)])
        found = minimize_scalar(lambda fov: _turns(few, of(fov), size_hw)[1].mean(), bounds=FOV_DEG, method="bounded")
        k = of(float(found.x))
    turns, left = _turns(pairs, k, size_hw)
    frames = len(failed.c2w)
    linked, blocks = np.zeros((frames, frames)), np.zeros((frames, 3, frames, 3))
    for (a, b), rotation in turns.items():
        linked[a, b] = linked[b, a] = 1.0
        blocks[b, :, a], blocks[a, :, b] = rotation, rotation.T
    _, part = connected_components(linked, directed=False)
    inside = np.flatnonzero(part == np.bincount(part).argmax())
    degree = linked[np.ix_(inside, inside)].sum(1) ** -0.5
    blocks = blocks[inside][:, :, inside] * degree[:, None, None, None] * degree[:, None]
    n = 3 * len(inside)
    _, vectors = eigh(blocks.reshape(n, n), subset_by_index=[n - 3, n - 1])
    u, _, vt = np.linalg.svd(vectors.reshape(-1, 3, 3))
    w2c = u @ vt
    w2c = w2c * np.linalg.det(w2c)[:, None, None]
    c2w = failed.c2w.copy()
    c2w[inside] = np.eye(4)
    c2w[inside, :3, :3] = w2c[0] @ w2c.swapaxes(1, 2)
    share, residual = len(inside) / frames, float(np.median(left))
    return replace(
        failed, c2w=c2w, intrinsics=k, motion="rotation", registered=share, reprojection_px=residual,
        confidence=share / (1 + residual),
    ), float(np.quantile(left, 0.9))  # fmt: skip


def _structure(
    model: pycolmap.Reconstruction, failed: Reconstruction, size_hw: tuple[int, int], depth: Array | None, pairs: Pairs
) -> Reconstruction:
    """The model relative to its first registered frame, in its unit or metres."""
    images = {int(Path(model.images[i].name).stem): model.images[i] for i in model.reg_image_ids()}
    c2w = failed.c2w.copy()
    for i, image in images.items():
        c2w[i] = np.linalg.inv(np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]]))
    first = np.linalg.inv(c2w[min(images)])
    ids, points = np.array(list(model.points3D)), np.array([p.xyz for p in model.points3D.values()]).reshape(-1, 3)
    c2w, points = first @ c2w, points @ first[:3, :3].T + first[:3, 3]
    row = {int(name): i for i, name in enumerate(ids)}
    rays_px, depths, rows = {}, {}, {}
    for i, image in images.items():
        seen = [(p.xy, row[p.point3D_id]) for p in image.points2D if p.has_point3D()]
        rows[i] = np.array([r for _, r in seen], dtype=int)
        rays_px[i] = np.array([xy for xy, _ in seen]).reshape(-1, 2)
        depths[i] = (points[rows[i]] - c2w[i, :3, 3]) @ c2w[i, :3, 2]
    unit, spread = _unit(rays_px, depths, depth, size_hw)
    c2w[:, :3, 3] *= unit
    points = points * unit
    K = next(iter(model.cameras.values())).calibration_matrix()
    k = K[[0, 1, 0, 1], [0, 1, 2, 2]] / np.tile(size_hw[::-1], 2)
    share = len(images) / len(c2w)
    reason = f"the metres of a unit vary by {spread:.2g} of their mean over frames" if spread > SCALE_SPREAD else ""
    return _judged(replace(
        failed, c2w=c2w, intrinsics=k, motion="structure", registered=share, points=points, metric=depth is not None,
        reprojection_px=float(model.compute_mean_reprojection_error()), reason=reason,
        agreement=float(explained(pairs, c2w, k, size_hw).min(initial=1.0)),
        confidence=share * _well_seen(points, rows, c2w),
    ))  # fmt: skip


def _unit(
    pixels: dict[int, Array], depths: dict[int, Array], depth: Array | None, size_hw: tuple[int, int]
) -> tuple[float, float]:
    """Factor that brings the sparse depths to the asked unit, and how much it varies over frames."""
    if depth is None or depth.ndim == 0:
        return float(1.0 if depth is None else depth) / float(np.median(np.concatenate(list(depths.values())))), 0.0
    size = np.array(depth.shape[:0:-1])
    ratios = []
    for i, xy in pixels.items():
        x, y = np.clip((xy / size_hw[::-1] * size).astype(int), 0, size - 1).T
        known = depth[i, y, x]
        ok = np.isfinite(known) & (known > 0) & (depths[i] > 0)
        if ok.any():
            ratios.append(float(np.median(known[ok] / depths[i][ok])))
    if not ratios:
        return math.nan, math.inf
    return float(np.median(ratios)), float(np.std(ratios) / np.mean(ratios))


def _well_seen(points: Array, rows: dict[int, Array], c2w: Array) -> float:
    """Share of points whose rays from the first and last frame that see them meet at two degrees or more."""
    first, last = np.full(len(points), -1), np.full(len(points), -1)
    for i in sorted(rows, reverse=True):
        first[rows[i]] = i
    for i in sorted(rows):
        last[rows[i]] = i
    ok = first >= 0
    a, b = (points[ok] - c2w[index[ok], :3, 3] for index in (first, last))
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)).clip(1e-12)
    return float((cosine < math.cos(math.radians(2))).mean()) if len(cosine) else 0.0


def _judged(found: Reconstruction) -> Reconstruction:
    """With the first reason not to use the cameras, if there is one."""
    known = np.isfinite(found.c2w).all((1, 2))
    fov = fov_deg(torch.from_numpy(found.intrinsics))
    reasons = [found.reason] if found.reason else []
    if found.registered < MIN_REGISTERED:
        reasons.append(f"only {known.sum()} of {len(known)} frames could be registered")
    if found.reprojection_px > (_NEARLY_TURNED_PX if found.motion == "rotation" else MAX_REPROJECTION_PX):
        reasons.append(f"points come back {found.reprojection_px:.1f} pixels off on average")
    if found.agreement < MIN_AGREEMENT:
        reasons.append(f"between two neighbouring frames the cameras explain {found.agreement:.0%} of the matches only")
    if not bool(((fov > FOV_DEG[0]) & (fov < FOV_DEG[1])).all()):
        reasons.append(f"field of view {fov[0]:.0f} x {fov[1]:.0f} degrees, outside {FOV_DEG[0]:g} to {FOV_DEG[1]:g}")
    for what, step_S3, least in (
        ("position", np.diff(found.c2w[:, :3, 3], axis=0), 0.0),
        ("direction", _steps(found.c2w), math.radians(2)),
    ):
        length, change = np.linalg.norm(step_S3, axis=1), np.linalg.norm(np.diff(step_S3, axis=0), axis=1)
        usual = np.nanquantile(length, 0.9) if np.isfinite(length).any() else 0.0
        change = np.nan_to_num(change, nan=0.0)
        if len(change) and change.max() > max(MAX_JUMP * usual, least):
            reasons.append(f"the {what} jumps at frame {change.argmax() + 1}: frames placed wrongly, or a cut")
    return replace(found, reason="; ".join(reasons))


def _steps(c2w_F44: Array) -> Array:
    """Rotation vectors (F-1,3) from frame to frame; NaN beside frames that are not known."""
    step = c2w_F44[:-1, :3, :3].swapaxes(1, 2) @ c2w_F44[1:, :3, :3]
    ok = np.isfinite(step).all((1, 2))
    vectors = np.full((len(step), 3), np.nan)
    vectors[ok] = Rotation.from_matrix(step[ok]).as_rotvec()
    return vectors
