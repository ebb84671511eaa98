"""Small procedural worlds: ray-cast rooms with exact depth, moving things, cuts, captions and any camera path.

A scene is a box to be inside of and axis-aligned boxes and spheres in it, some of them moving. World axes are
OpenCV's (x right, y down, z forward), metres; the floor is at y = 0 and up is -y. Textures are sums of few
sines of the point on the surface, so they are band-limited and move with their object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from vgr.data.video import Clip
from vgr.seeding import numpy_generator

_COLOURS = {"red": (0.80, 0.22, 0.18), "green": (0.25, 0.62, 0.28), "blue": (0.22, 0.36, 0.80),
            "yellow": (0.85, 0.75, 0.22), "white": (0.82, 0.82, 0.80), "purple": (0.55, 0.28, 0.65),
            "orange": (0.88, 0.50, 0.16), "teal": (0.18, 0.60, 0.60)}
_SINES = 5
Textures = list[np.ndarray]  # waves (N,sines,3), phases (N,sines), tints (N,sines,3), base colours (N,3)
_LIGHT = np.array([0.449, -0.798, 0.402], dtype=np.float32)


@dataclass(frozen=True)
class Thing:
    """A box or sphere: half size (3,) (a sphere's radius thrice), centre + swing * sin(2 pi rate t + phase)."""

    shape: str
    colour: str
    half: np.ndarray
    centre: np.ndarray
    swing: np.ndarray
    rate: float
    phase: float

    def at(self, time_s: float) -> np.ndarray:
        """Its centre (3,) at a time in seconds."""
        return self.centre + self.swing * np.sin(2 * np.pi * self.rate * time_s + self.phase)


class Scene:
    """One room drawn from `rng`; the same generator state gives the same room.

    half: the room's half size (3,); things: what stands and moves in it. `render` is exact for any pose
    within the room.
    """

    def __init__(self, rng: np.random.Generator, wall_contrast: float = 1.0) -> None:
        self.half = np.array([rng.uniform(3, 5), rng.uniform(1.4, 2.2), rng.uniform(3, 5)], dtype=np.float32)
        self.centre = np.array([0.0, -self.half[1], 0.0], dtype=np.float32)
        self.colour = str(rng.choice(list(_COLOURS)))
        self.things = [self._thing(rng, i) for i in range(int(rng.integers(3, 6)))]
        base = 0.8 * np.array([_COLOURS[self.colour], *(_COLOURS[t.colour] for t in self.things)])
        # Wavelengths of 0.5 to 2.5 m for walls and a third of that for things: none is finer than a pixel
        # seen from a few metres.
        self._textures = textures(rng, base, np.array([1.0] + [0.35] * len(self.things)))
        self._textures[2][0] *= wall_contrast

    def _thing(self, rng: np.random.Generator, index: int) -> Thing:
        shape = str(rng.choice(["box", "sphere"]))
        size = rng.uniform(0.25, 0.6)
        half = np.full(3, size) if shape == "sphere" else size * rng.uniform(0.6, 1.4, 3)
        half = half.astype(np.float32)
        # Around the middle, which stays free for cameras; boxes on the floor, spheres in the air.
        angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(2.0, 2.6)
        height = half[1] if shape == "box" else rng.uniform(half[1] + 0.2, self.half[1] * 1.2)
        centre = np.array([away * np.cos(angle), -height, away * np.sin(angle)])
        moving = index < 2  # every room has two things that move, along the circle, so never to the middle
        swing = np.array([-np.sin(angle), 0.0, np.cos(angle)]) * (rng.uniform(0.4, 1.0) if moving else 0.0)
        colour = str(rng.choice(list(_COLOURS)))
        return Thing(shape, colour, half, centre, swing, rng.uniform(0.15, 0.4), rng.uniform(0, 6.28))

    def put(self, thing: Thing, look: Textures) -> None:
        """Adds a thing with a look of its own, `textures` of one; it becomes the last of `things`."""
        self.things.append(thing)
        self._textures = [np.concatenate(pair) for pair in zip(self._textures, look, strict=True)]

    def caption(self) -> str:
        """What the room holds: "teal room with blue box, red sphere, red sphere"."""
        return f"{self.colour} room with {', '.join(sorted(f'{t.colour} {t.shape}' for t in self.things))}"

    def cast(self, origin_3: np.ndarray, rays_N3: np.ndarray, time_s: float) -> tuple[np.ndarray, ...]:
        """What rays from a point in the room hit: distances in lengths of the rays (N,), colours (N,3) 0 to 1, and
        which it is (N,), 0 for the room and 1 + i for things[i]."""
        origin_3, rays_N3 = origin_3.astype(np.float32), rays_N3.astype(np.float32)
        rays_N3 = np.where(np.abs(rays_N3) < 1e-9, np.float32(1e-9), rays_N3)
        solids = [("room", self.centre, self.half)]
        solids += [(t.shape, t.at(time_s).astype(np.float32), t.half) for t in self.things]
        distance_SN = np.stack([_HIT[shape](origin_3 - middle, rays_N3, half) for shape, middle, half in solids])
        nearest_N, index_N = distance_SN.min(axis=0), distance_SN.argmin(axis=0)
        waves, phases, tints, base = self._textures
        colour_N3 = np.empty_like(rays_N3)
        for i, (shape, middle, half) in enumerate(solids):
            mine = index_N == i
            point = origin_3 - middle + nearest_N[mine, None] * rays_N3[mine]
            colour = base[i] + np.sin(point @ waves[i].T + phases[i]) @ tints[i]
            if shape == "sphere":
                normal = point / half
            else:  # the face on which the point lies is the one it is relatively nearest to; the room's look inward
                axis = np.abs(point / half).argmax(axis=1)
                normal = np.eye(3, dtype=np.float32)[axis] * np.sign(point) * (-1 if shape == "room" else 1)
            colour_N3[mine] = colour * (0.75 + 0.25 * (normal @ _LIGHT))[:, None]
        return nearest_N, np.clip(colour_N3, 0, 1), index_N

    def render(self, c2w_44: np.ndarray, k_4: np.ndarray, time_s: float, size_hw: tuple[int, int]) -> np.ndarray:
        """Image (H,W,3) uint8 at a time in seconds, 2x2 samples a pixel averaged."""
        height, width = size_hw
        _, fine, _ = self._view(c2w_44, k_4, time_s, (2 * height, 2 * width))
        image = fine.reshape(height, 2, width, 2, 3).mean(axis=(1, 3))
        return (image * 255).round().astype(np.uint8)

    def depth(self, c2w_44: np.ndarray, k_4: np.ndarray, time_s: float, size_hw: tuple[int, int]) -> np.ndarray:
        """Planar depth (H,W) float32 in metres at pixel centres."""
        return self._view(c2w_44, k_4, time_s, size_hw)[0].reshape(size_hw)

    def which(self, c2w_44: np.ndarray, k_4: np.ndarray, time_s: float, size_hw: tuple[int, int]) -> np.ndarray:
        """What is seen at pixel centres (H,W): 0 the room, 1 + i things[i]."""
        return self._view(c2w_44, k_4, time_s, size_hw)[2].reshape(size_hw)

    def _view(
        self, c2w_44: np.ndarray, k_4: np.ndarray, time_s: float, size_hw: tuple[int, int]
    ) -> tuple[np.ndarray, ...]:
        v, u = (((np.arange(n) + 0.5) / n - c) / f for n, c, f in zip(size_hw, k_4[[3, 2]], k_4[[1, 0]]))
        rays = np.stack([*np.meshgrid(u, v), np.ones(size_hw)], axis=-1).reshape(-1, 3)
        # The rays' third component is 1, so lengths along them are planar depths.
        return self.cast(c2w_44[:3, 3], rays @ c2w_44[:3, :3].T, time_s)


def textures(rng: np.random.Generator, base_N3: np.ndarray, scale_N: np.ndarray) -> Textures:
    """Sums of sines of 0.5 to 2.5 m times scale, around base colours 0 to 1."""
    count, scale = len(base_N3), scale_N[:, None, None]
    waves = rng.normal(size=(count, _SINES, 3))
    waves /= np.linalg.norm(waves, axis=-1, keepdims=True)
    waves *= 2 * np.pi / (rng.uniform(0.5, 2.5, (count, _SINES, 1)) * scale)
    phases = rng.uniform(0, 2 * np.pi, (count, _SINES))
    tints = rng.normal(scale=0.02, size=(count, _SINES, 3)) + rng.normal(scale=0.08, size=(count, _SINES, 1))
    return [x.astype(np.float32) for x in (waves, phases, tints, base_N3)]


def _leave_box(origin_3: np.ndarray, rays_N3: np.ndarray, half_3: np.ndarray) -> np.ndarray:
    """How far along rays from inside a box leave it."""
    return reduce(np.minimum, ((np.sign(rays_N3) * half_3 - origin_3) / rays_N3).T).astype(np.float32)


def _enter_box(origin_3: np.ndarray, rays_N3: np.ndarray, half_3: np.ndarray) -> np.ndarray:
    """How far along rays enter a box from outside; infinity: nowhere."""
    toward_N3 = np.sign(rays_N3) * half_3
    # Column by column: numpy's own maximum over an axis of three is ten times slower.
    enter_N = reduce(np.maximum, ((-toward_N3 - origin_3) / rays_N3).T)
    leave_N = reduce(np.minimum, ((toward_N3 - origin_3) / rays_N3).T)
    return np.where((enter_N < leave_N) & (enter_N > 1e-6), enter_N, np.inf)


def _enter_sphere(origin_3: np.ndarray, rays_N3: np.ndarray, half_3: np.ndarray) -> np.ndarray:
    """How far along rays enter a sphere of radius half_3[0] from outside; infinity: nowhere."""
    a, b = np.einsum("nc,nc->n", rays_N3, rays_N3), rays_N3 @ origin_3
    inside = b * b - a * (origin_3 @ origin_3 - half_3[0] ** 2)
    t_N = (-b - np.sqrt(np.maximum(inside, 0))) / a
    return np.where((inside > 0) & (t_N > 1e-6), t_N, np.inf)


_HIT = {"room": _leave_box, "box": _enter_box, "sphere": _enter_sphere}


def free_flight(rng: np.random.Generator, scene: Scene, frames: int, fps: float) -> np.ndarray:
    """c2w (F,4,4) of a smooth flight with all six degrees of freedom in the free middle of a room."""
    time_F = np.arange(frames) / fps

    def wave(size: float) -> np.ndarray:
        rates, phases = rng.uniform(0.05, 0.25, 2), rng.uniform(0, 2 * np.pi, 2)
        return size * 0.5 * np.sin(2 * np.pi * np.outer(time_F, rates) + phases).sum(axis=1)

    yaw = rng.uniform(0, 2 * np.pi) + rng.uniform(-0.5, 0.5) * time_F + wave(0.6)
    pitch, roll = wave(0.35), wave(0.2)
    position_F3 = np.stack([wave(0.9), -scene.half[1] + wave(0.6), wave(0.9)], axis=1)
    pose = np.tile(np.eye(4), (frames, 1, 1))
    # Yaw to the right about down, pitch up about right, then roll about forward.
    pose[:, :3, :3] = Rotation.from_euler("YXZ", np.stack([yaw, pitch, roll], axis=1)).as_matrix()
    pose[:, :3, 3] = position_F3
    return pose


class WorldSource:
    """Clips of free flights through rooms; no room of a split is in the other.

    cut_share of the clips cut to another room at a frame of their own; depth keeps (F,H,W) planar metres.
    """

    licence = "made by this program: CC0-1.0"

    def __init__(self, frames: int, size_hw: tuple[int, int], fps: float = 16.0, cut_share: float = 0.25,
                 depth: bool = True, clips_per_visit: int = 4) -> None:
        self.frames, self.size_hw, self.fps = frames, (int(size_hw[0]), int(size_hw[1])), fps
        self.cut_share, self.depth, self.clips_per_visit = cut_share, depth, clips_per_visit
        self.splits: dict[str, Any] = {"train": ["worlds-train"], "val": ["worlds-val"]}
        if frames < 4 or not 0 <= cut_share <= 1:
            raise ValueError(f"source.frames={frames}, source.cut_share={cut_share}: at least 4, and a share of 0 to 1")

    def capture(self, seed: int, split: str, visit: int) -> list[Clip]:
        """The clips of one visit: a pure function of (seed, split, visit)."""
        first = visit * self.clips_per_visit
        return [self.clip(seed, split, i) for i in range(first, first + self.clips_per_visit)]

    def clip(self, seed: int, split: str, index: int) -> Clip:
        """Clip `index` of a split."""
        rng = numpy_generator(seed, self.splits[split][0], index)
        cut = int(rng.integers(self.frames // 4, self.frames * 3 // 4)) if rng.random() < self.cut_share else None
        bounds = [0, self.frames] if cut is None else [0, cut, self.frames]
        frames, depths, poses, shots = [], [], [], []
        # Square pixels and a wide view, a little different in each clip.
        fx = rng.uniform(0.5, 0.7)
        k_4 = np.array([fx, fx * self.size_hw[1] / self.size_hw[0], 0.5, 0.5])
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            scene = Scene(rng)
            c2w_F44 = free_flight(rng, scene, end - start, self.fps)
            for f, pose in enumerate(c2w_F44, start):
                frames.append(scene.render(pose, k_4, f / self.fps, self.size_hw))
                if self.depth:
                    depths.append(scene.depth(pose, k_4, f / self.fps, self.size_hw))
            poses.append(c2w_F44)
            shots.append({"start": start, "end": end, "caption": scene.caption()})
        return Clip(
            frames=np.stack(frames), c2w=np.concatenate(poses), intrinsics=np.tile(k_4, (self.frames, 1)),
            fps=self.fps, shots=shots, source={"name": "worlds", "scene": f"{split}-{index}"},
            depth=np.stack(depths) if self.depth else None,
        )
