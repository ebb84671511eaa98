"""Stories: clips of several shots in which characters return that only memory can draw right (causal-video spec 3, 4).

A character is one large sphere or box. Its look (shape, hue, texture) is drawn per story and never told: captions
give its name and the room's colour, "Kim in the blue room", and names say nothing of looks. So a first appearance
cannot be foreseen, and a return only by who finds the earlier shot. All returns lie beyond the model's window, and
in a share of the stories the character of the first frame never returns, so that keeping the first frames is of no
use there. Rooms, other things in them and the renderer are those of `vgr.data.worlds`.
"""

from __future__ import annotations

import colorsys
import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from vgr.data.video import Clip
from vgr.data.worlds import Scene, Textures, Thing, textures
from vgr.seeding import numpy_generator

NAMES = ("Kim", "Bo", "Ada", "Max", "Tom", "Zoe")
_CAST = 3
_FRONT = 0.842  # radians: seen from here the light falls on a thing, so that it looks alike from all sides shown
_FOCAL = 0.6


@dataclass(frozen=True)
class _Part:
    """A shot as it is played: its entry in `Clip.shots`, its room with the character put in, c2w (F,4,4)."""

    entry: dict[str, Any]
    scene: Scene
    c2w: np.ndarray


class StorySource:
    """Stories of frames = 1 + n * chunk * stride raw frames: n chunks as `Layout.chunked` makes them.

    stride: the codec's temporal stride; chunk: latent frames a chunk; shots: fewest and most a story, cuts on chunk
    edges, or (1, 1): clips without a cut, in which nothing returns; window: chunks the model remembers anyway: a
    character returns only when at least so many whole chunks lie between; trap_share: stories whose first character
    does not return. No story of a split is in the other.
    Raises ValueError on sizes in which no story fits.

    A shot's entry has, beside start, end and caption: character (a name, or None in a shot of an empty room), id
    (1 + its place among the story's characters, 0 for none) and returns_from (the shot it was first seen in, or None).
    """

    licence = "made by this program: CC0-1.0"

    def __init__(self, frames: int = 61, size_hw: tuple[int, int] = (64, 64), fps: float = 8.0, stride: int = 2,
                 chunk: int = 3, shots: tuple[int, int] = (4, 6), window: int = 3, trap_share: float = 0.5,
                 clips_per_visit: int = 4) -> None:
        self.frames, self.size_hw, self.fps = frames, (int(size_hw[0]), int(size_hw[1])), fps
        self.stride, self.chunk, self.shots, self.window = stride, chunk, (int(shots[0]), int(shots[1])), window
        self.trap_share, self.clips_per_visit = trap_share, clips_per_visit
        self.splits: dict[str, Any] = {"train": ["stories-train"], "val": ["stories-val"]}
        count, rest = divmod(frames - 1, chunk * stride)
        fit = self.shots == (1, 1) or 3 <= self.shots[0] <= self.shots[1] <= count
        if rest or not fit or count < window + 3 or not 0 <= trap_share <= 1:
            raise ValueError(
                f"source.frames={frames}, source.shots={list(self.shots)}, source.trap_share={trap_share}: frames must "
                f"be 1 + n x {chunk * stride} with n at least source.window + 3 = {window + 3}, shots two numbers from "
                f"3 to n in order or [1, 1], and the share 0 to 1")
        for trap in {trap_share > 0, trap_share == 1}:  # the kinds there will be, tried before anything is written
            _plot(numpy_generator(0, "plots"), count, self.shots, window, trap)

    def capture(self, seed: int, split: str, visit: int) -> list[Clip]:
        """The clips of one visit: a pure function of (seed, split, visit)."""
        first = visit * self.clips_per_visit
        return [self.clip(seed, split, i) for i in range(first, first + self.clips_per_visit)]

    def clip(self, seed: int, split: str, index: int) -> Clip:
        """Story `index` of a split."""
        k_4, parts = self._story(seed, split, index)
        frames = [p.scene.render(pose, k_4, f / self.fps, self.size_hw)
                  for p in parts for f, pose in enumerate(p.c2w, p.entry["start"])]
        return Clip(
            frames=np.stack(frames), c2w=np.concatenate([p.c2w for p in parts]),
            intrinsics=np.tile(k_4, (self.frames, 1)), fps=self.fps, shots=[p.entry for p in parts],
            source={"name": "stories", "scene": f"{split}-{index}"},
        )

    def masks(self, seed: int, split: str, index: int) -> np.ndarray:
        """(F,H,W) uint8 of the same story: the id of the character at each pixel's centre, 0 none."""
        k_4, parts = self._story(seed, split, index)
        return np.stack([
            (p.scene.which(pose, k_4, f / self.fps, self.size_hw) == len(p.scene.things)) * np.uint8(p.entry["id"])
            for p in parts for f, pose in enumerate(p.c2w, p.entry["start"])
        ])

    def _story(self, seed: int, split: str, index: int) -> tuple[np.ndarray, list[_Part]]:
        """Intrinsics (4,) and the shots of a story."""
        purpose = self.splits[split][0]
        rng = numpy_generator(seed, purpose, index)
        k_4 = np.array([_FOCAL, _FOCAL * self.size_hw[1] / self.size_hw[0], 0.5, 0.5])
        edges, who = _plot(rng, (self.frames - 1) // (self.chunk * self.stride), self.shots, self.window,
                           rng.random() < self.trap_share)
        # The first chunk is a latent frame longer, and that one is a single raw frame.
        starts = [0, *(1 + e * self.chunk * self.stride for e in edges[1:-1]), self.frames]
        names = rng.choice(NAMES, _CAST, replace=False)
        cast = [_look(rng, hue) for hue in _hues(rng)]
        parts: list[_Part] = []
        sides: list[float] = []
        for s, c in enumerate(who):
            first = who.index(c) if c is not None and c in who[:s] else None
            room, side = s, rng.uniform(-1.2, 1.2)
            if first is not None and rng.random() < 0.25:  # the same room again, from another side
                room, side = first, sides[first] - np.copysign(rng.uniform(0.7, 1.2), sides[first])
            sides.append(side)
            scene = Scene(numpy_generator(seed, purpose, index, room), wall_contrast=0.4)
            scene.things = [dataclasses.replace(t, centre=t.centre * (1.35, 1, 1.35)) for t in scene.things]
            if c is not None:
                scene.put(*cast[c])
            entry = {
                "start": starts[s], "end": starts[s + 1],
                "caption": ("" if c is None else f"{names[c]} in ") + f"the {scene.colour} room",
                "character": None if c is None else str(names[c]), "id": 0 if c is None else c + 1,
                "returns_from": first,
            }
            height = -scene.half[1] if c is None else cast[c][0].centre[1]
            parts.append(_Part(entry, scene, _orbit(rng, side, height, starts[s + 1] - starts[s], self.fps)))
        return k_4, parts


def _plot(rng: np.random.Generator, chunks: int, shots: tuple[int, int], window: int,
          trap: bool) -> tuple[list[int], list[int | None]]:
    """Chunk edges of the shots (S+1,) and each one's character, by order of appearance; None is an empty room.

    Plots are drawn until one has a return, but for a single shot; a return is far (`window` chunks between) and, in a
    trap, not of the first. ValueError where none is found.
    """
    for _ in range(2000):
        count = int(rng.integers(shots[0], shots[1] + 1))
        edges = [0, *sorted(rng.choice(np.arange(1, chunks), count - 1, replace=False).tolist()), chunks]
        who: list[int | None] = [0]
        returns = 0
        while len(who) < count:
            start = edges[len(who)]
            last = {c: edges[s + 1] for s, c in enumerate(who) if c is not None}
            far = [c for c, end in last.items() if start - end >= window and not (trap and c == 0)]
            new = [len(last)] if len(last) < _CAST else []
            empty = [None] if not new and None not in who else []
            options = far or new or empty
            if not options:
                break
            who.append(options[int(rng.integers(len(options)))])
            returns += bool(far)
        if len(who) == count and (returns or count == 1):
            return edges, who
    raise ValueError(f"source.shots={list(shots)}, source.window={window}: no story of {chunks} chunks has so many "
                     f"shots and a return{' of another than the first character' if trap else ''}; take fewer shots "
                     "or more source.frames")


def _hues(rng: np.random.Generator) -> np.ndarray:
    """Hues (cast,) in turns that nobody confuses: any two at least a seventh of a turn apart."""
    while True:
        hues = rng.uniform(size=_CAST)
        gaps = np.abs(hues[:, None] - hues) + np.eye(_CAST)
        if np.minimum(gaps, 1 - gaps + 2 * np.eye(_CAST)).min() > 1 / 7:
            return hues


def _look(rng: np.random.Generator, hue: float) -> tuple[Thing, Textures]:
    """A character: a thing in the middle of a room and what it looks like."""
    shape = str(rng.choice(["box", "sphere"]))
    half = (np.full(3, 0.5) if shape == "sphere" else rng.uniform(0.34, 0.42, 3)).astype(np.float32)
    base = np.array([colorsys.hsv_to_rgb(hue, 0.9, 0.95)])
    thing = Thing(shape, "own", half, np.array([0.0, -0.7, 0.0]), np.array([0.0, 0.05, 0.0]), rng.uniform(0.2, 0.4),
                  rng.uniform(0, 6.28))
    return thing, textures(rng, base, np.array([0.35]))


def _orbit(rng: np.random.Generator, side: float, height: float, frames: int, fps: float) -> np.ndarray:
    """c2w (F,4,4) of a slow move around a room's middle, looking near it; side in radians from where the light is."""
    time_F = np.arange(frames) / fps
    angle = _FRONT + side + rng.choice([-1, 1]) * rng.uniform(0.05, 0.2) * time_F
    pitch = np.full(frames, rng.uniform(-0.25, 0.05))  # down to level
    away = 1.15 + rng.uniform(-0.08, 0.08) + rng.uniform(-0.04, 0.04) * time_F
    pose = np.tile(np.eye(4), (frames, 1, 1))
    # Yaw to the right about down: seen from `angle` (from x towards z) the middle lies the other way.
    pose[:, :3, :3] = Rotation.from_euler("YX", np.stack([-angle - np.pi / 2, pitch], axis=1)).as_matrix()
    aim = np.array([0.0, height, 0.0]) + rng.uniform(-0.08, 0.08, 3)
    pose[:, :3, 3] = aim - away[:, None] * pose[:, :3, 2]
    return pose
