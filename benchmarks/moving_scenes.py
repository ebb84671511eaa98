"""Scenes in which a known share of the picture moves on its own, with exact depth, cameras, masks and ways.

What stands still is a room of `vgr.data.worlds`, or a walk through a held-out VizDoom map on which no creature is in
sight; into both come the same boxes and spheres, ray-cast, put in by depth, one up to a tenth of the picture and two
beyond. Each keeps its distance as the camera goes ahead, and crosses the way of the picture's middle in the chunk that
is to be made, by 12 to 24 pixels of 128 in it, never quite at one speed: at 0.05 to 0.2 swings a second. Of one scene
the share alone differs: what stands still, the ways and the looks are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from vgr.data.doom import DoomSource
from vgr.data.video import Clip
from vgr.data.worlds import Scene, Thing, free_flight
from vgr.geometry.conventions import Array
from vgr.seeding import numpy_generator
from vgr.types import Cameras

SIZE_HW, FPS = (96, 128), 17.5
PAST, CHUNK = 17, 16  # frames before what is to be made, and of it
LAST, FRAMES = PAST - 1, PAST + CHUNK
MIDDLE = LAST + CHUNK // 2  # when things pass the middle of the picture
PIXELS, RATE = (12, 24), (0.05, 0.2)  # a thing's way in the chunk at this width; swings a second
OFF = 0.15  # of the share asked for, so far a scene may be from it
IN_VIEW = 0.4  # of a thing's mean size, so much of it is seen a little before the chunk and at both of its ends
KINDS = ("procedural", "engine")


@dataclass(frozen=True)
class Shot:
    """frames (F,H,W,3) uint8; depth (F,H,W) metres; c2w (F,4,4) from the first; k (4,); which (F,H,W): 0 what stands,
    i the i-th thing; where (F,N,3): the middles of the things."""

    frames: NDArray[np.uint8]
    depth: NDArray[np.float32]
    c2w: Array
    k: Array
    which: NDArray[np.int64]
    where: Array
    caption: str

    @property
    def share(self) -> float:
        """Of the pixels of the last true frame and of the chunk, that move."""
        return float((self.which[LAST:] > 0).mean())

    def cameras(self) -> Cameras:
        return Cameras(torch.from_numpy(self.c2w)[None].float(), torch.from_numpy(self.k).float().repeat(1, FRAMES, 1))

    def pixels(self, points_N3: Array, frame: int) -> Array:
        """Where a frame shows points of the world, (N,2); NaN behind the camera."""
        local = (points_N3 - self.c2w[frame, :3, 3]) @ self.c2w[frame, :3, :3]
        z = np.where(local[:, 2:] > 0.1, local[:, 2:], np.nan)
        return (local[:, :2] / z * self.k[:2] + self.k[2:]) * SIZE_HW[::-1]


def standing(kind: str, seed: int) -> Iterator[Clip]:
    """Clips of FRAMES frames in which nothing moves but the camera, without end."""
    if kind == "procedural":
        index = 0
        while True:
            yield room(numpy_generator(seed, "standing room", index))
            index += 1
    source, visit = DoomSource(FRAMES, SIZE_HW, skip=2, pace=0.5, depth=True, clips_per_visit=2), 0
    while True:
        for clip in source.capture(seed, "val", visit):
            way = np.linalg.norm(np.diff(clip.c2w[LAST:, :3, 3], axis=0), axis=1).sum()
            if way > 0.25 and " with " not in clip.shots[0]["caption"]:
                yield clip
        visit += 1


def room(rng: np.random.Generator) -> Clip:
    """A flight through a room whose things stand still."""
    scene = Scene(rng)
    scene.things = [replace(thing, swing=0 * thing.swing) for thing in scene.things]
    c2w, k = free_flight(rng, scene, FRAMES, FPS), np.array([0.6, 0.8, 0.5, 0.5])
    views = [(scene.render(pose, k, 0.0, SIZE_HW), scene.depth(pose, k, 0.0, SIZE_HW)) for pose in c2w]
    shots = [{"start": 0, "end": FRAMES, "caption": scene.caption()}]
    return Clip(*(np.stack([view[0] for view in views]), c2w, np.tile(k, (FRAMES, 1)), FPS, shots),
                depth=np.stack([view[1] for view in views]))  # fmt: skip


def grades(clip: Clip, shares: Sequence[float], seed: int) -> list[Shot] | None:
    """The scene at each share; None where something is in the way of one, or it leaves the picture."""
    found: list[Shot] = []
    for share in sorted(shares, reverse=True):  # the largest fails first
        shot = grade(clip, share, seed)
        if shot is None:
            return None
        found.append(shot)
    return [found[sorted(shares, reverse=True).index(share)] for share in shares]


def grade(clip: Clip, share: float, seed: int) -> Shot | None:
    """The clip with so much of its pixels moving: things of the size that it takes, found by halving."""
    c2w, k = np.linalg.inv(clip.c2w[0]) @ clip.c2w, clip.intrinsics[0]
    scene = Scene(numpy_generator(seed, "looks of things"))
    scene.half = np.full(3, 1e4, np.float32)  # walls are the clip's
    draw = partial(things, scene.things, clip, c2w, 0 if share == 0 else 1 if share <= 0.1 else 2, seed)
    low, high = 0.02, 8.0
    for _ in range(14 if share else 0):
        size = (low * high) ** 0.5
        scene.things = draw(size)
        seen = [cast(scene, clip.depth[f][::2, ::2], c2w[f], k, f)[2] > 0 for f in range(LAST, FRAMES, 4)]
        low, high = (size, high) if np.mean(seen) < share else (low, size)
    scene.things = draw(low) if share else []
    views = [put(scene, frame, depth, pose, k, f) for f, (frame, depth, pose) in
             enumerate(zip(clip.frames, clip.depth, c2w))]  # fmt: skip
    frames, depths, which = (np.stack(parts) for parts in zip(*views))
    where = np.array([[thing.at(f / FPS) for thing in scene.things] for f in range(FRAMES)]).reshape(FRAMES, -1, 3)
    shot = Shot(frames, depths, c2w, k, which, where, clip.shots[0]["caption"])
    sizes = np.stack([(which == i).sum((1, 2)) for i in range(1, 1 + len(scene.things))] or [np.ones(FRAMES)])
    whole = sizes[:, [LAST - 4, LAST, -1]] >= IN_VIEW * sizes[:, LAST:].mean(1, keepdims=True)
    return shot if whole.all() and abs(shot.share - share) <= OFF * share else None


def things(looks: list[Thing], clip: Clip, c2w: Array, count: int, seed: int, size: float) -> list[Thing]:
    """`count` things of that size on their ways: see the module's text."""
    rng, middle, made = numpy_generator(seed, "ways of things"), c2w[MIDDLE], []
    (height, width), view = SIZE_HW, middle[:3, 2]
    went = view * ((c2w[-1, :3, 3] - c2w[LAST, :3, 3]) @ view)
    ahead = float(np.median(clip.depth[MIDDLE, height // 4 : -height // 4, width // 4 : -width // 4]))
    for i, look in enumerate(looks[:count]):
        z = np.clip(0.5 * ahead, 1.5, 3.0) * rng.uniform(0.9, 1.1)
        to_side = rng.uniform(-0.1, 0.1) + (0.22 * (2 * i - 1) if count == 2 else 0)
        place = z * np.array([to_side / clip.intrinsics[0, 0], rng.uniform(-0.1, 0.1) / clip.intrinsics[0, 1], 1])
        way = rng.uniform(*PIXELS) / width * z / clip.intrinsics[0, 0]
        rate, phase = rng.uniform(*RATE), rng.uniform(-0.3, 0.3)
        along = np.array([rng.choice([-1, 1]), rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)])
        swing = (middle[:3, :3] @ along * way + went) / (2 * np.sin(np.pi * rate * CHUNK / FPS))
        at, begins = middle[:3, :3] @ place + middle[:3, 3], phase - 2 * np.pi * rate * MIDDLE / FPS
        made.append(replace(look, half=size * look.half, centre=at, swing=swing, rate=rate, phase=begins))
    return made


def cast(
    scene: Scene, behind_HW: NDArray[np.float32], c2w_44: Array, k_4: Array, frame: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Depth (H,W), colour (H,W,3) 0 to 1 and number (H,W) of the things before what stands; number 0: it is nearer."""
    v, u = (((np.arange(n) + 0.5) / n - c) / f for n, c, f in zip(behind_HW.shape, k_4[[3, 2]], k_4[[1, 0]]))
    rays = np.stack([*np.meshgrid(u, v), np.ones(behind_HW.shape)], axis=-1).reshape(-1, 3)
    z, colour, which = scene.cast(c2w_44[:3, 3], rays @ c2w_44[:3, :3].T, frame / FPS)
    z, which = z.reshape(behind_HW.shape), which.reshape(behind_HW.shape)
    return z, colour.reshape(*behind_HW.shape, 3), np.where(z < behind_HW, which, 0)


def put(
    scene: Scene, frame_HW3: NDArray[np.uint8], depth_HW: NDArray[np.float32], c2w_44: Array, k_4: Array, frame: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """A frame with the things in it: picture, depth and which; edges are averages of 2x2 samples."""
    z, _, which = cast(scene, depth_HW, c2w_44, k_4, frame)
    behind, fine = frame_HW3.repeat(2, 0).repeat(2, 1), depth_HW.repeat(2, 0).repeat(2, 1)
    _, colour, shown = cast(scene, fine, c2w_44, k_4, frame)
    mixed = np.where(shown[..., None] > 0, 255 * colour, behind)
    mixed = mixed.reshape(SIZE_HW[0], 2, SIZE_HW[1], 2, 3).mean(axis=(1, 3))
    return mixed.round().astype(np.uint8), np.where(which > 0, z, depth_HW).astype(np.float32), which
