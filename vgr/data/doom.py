"""VizDoom walks: clips of a real game engine with exact cameras, moving things and captions.

The maps are those of Freedoom (BSD-3-Clause), which come with the vizdoom wheel. A clip depends on
(seed, split, index) alone: clips come in visits of a few to one map, and the engine starts afresh for every
visit, because animation phases and random tables survive an episode.

Cameras: Doom's x east, y north, z up in map units become OpenCV's x east, y down, z north at 32 units a metre;
90 degrees of horizontal view, and fy = 1.2 fx since Doom's pixels are taller than wide; pitch is 0.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vgr.data.doom_paths import DEPTH_STEP, TICS_PER_SECOND, Walker, draw_mood, free_space, start_heading
from vgr.data.video import Clip
from vgr.seeding import numpy_generator

UNITS_PER_METRE = 32.0
VAL_MAPS = ("freedoom1/E1M4", "freedoom1/E2M3", "freedoom1/E3M6", "freedoom1/E4M2", "freedoom2/MAP05",
            "freedoom2/MAP11", "freedoom2/MAP14", "freedoom2/MAP18", "freedoom2/MAP22", "freedoom2/MAP27")
_ALL_MAPS = tuple(f"freedoom1/E{e}M{m}" for e in range(1, 5) for m in range(1, 10)) + tuple(
    f"freedoom2/MAP{m:02d}" for m in range(1, 33)
)
# Maps so dark or cramped that hardly one walk in ten is worth keeping.
_LEFT_OUT = ("freedoom1/E3M1", "freedoom2/MAP16", "freedoom2/MAP24", "freedoom2/MAP31")
TRAIN_MAPS = tuple(m for m in _ALL_MAPS if m not in VAL_MAPS + _LEFT_OUT)
# Every resolution of the engine that is 4:3, the smallest first.
_WIDTHS = (160, 256, 320, 400, 512, 640, 800, 1024, 1280)
# Numbers in a map of what can be picked up: keys, weapons, ammunition, health, armour, powers.
_PICKUPS = (5, 6, 8, 13, 17, 38, 39, 40, 82, 83, *range(2001, 2009), *range(2010, 2016), 2018, 2019, *range(2022, 2027),
            *range(2045, 2050))
_MEDIUM, _MULTIPLAYER = 2, 16  # flags of a thing: there at the skill played, there only among players
_NAMES = {"DoomImp": "imp", "ZombieMan": "zombie", "Zombieman": "zombie", "ShotgunGuy": "shotgun zombie",
          "ChaingunGuy": "chaingun zombie", "Demon": "demon", "Spectre": "spectre", "LostSoul": "lost soul",
          "Cacodemon": "cacodemon", "HellKnight": "hell knight", "BaronOfHell": "baron of hell",
          "Fatso": "mancubus", "Arachnotron": "arachnotron", "Revenant": "revenant", "Archvile": "arch-vile",
          "PainElemental": "pain elemental", "Cyberdemon": "cyberdemon", "SpiderMastermind": "spider mastermind",
          "WolfensteinSS": "soldier", "ExplosiveBarrel": "barrel", "BigTree": "big tree", "TorchTree": "dead tree"}
_ROAM_TICS = 5  # between two decisions while walking to a start, where nothing is recorded
_SKY = (102, 255)  # what the depth buffer holds where nothing was drawn but sky
_NUMBERS = ("no", "one", "two", "three", "four")


def camera_to_world(x: float, y: float, z: float, angle_deg: float) -> np.ndarray:
    """(4,4) float64 OpenCV camera-to-world in metres of a Doom camera; angle counter-clockwise from east."""
    c, s = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    pose = np.eye(4)
    pose[:3, 0] = (s, 0.0, -c)
    pose[:3, 1] = (0.0, 1.0, 0.0)
    pose[:3, 2] = (c, 0.0, s)
    pose[:3, 3] = np.array((x, -z, y)) / UNITS_PER_METRE
    return pose


def _engine_size(size_hw: tuple[int, int]) -> tuple[int, int]:
    """The engine's smallest resolution of at least twice the output and a whole multiple of it."""
    height, width = size_hw
    if width * 3 != height * 4:
        raise ValueError(f"source.size_hw={list(size_hw)}: VizDoom's cameras are exact at 4:3 only, e.g. [96,128]")
    for candidate in _WIDTHS:
        if candidate >= 2 * width and candidate % width == 0:
            return candidate * 3 // 4, candidate
    raise ValueError(
        f"source.size_hw={list(size_hw)}: the width must divide one of the engine's {_WIDTHS} at least twice"
    )


def pickup_places(wad: Path, level: str) -> np.ndarray:
    """(N,2) map units of what can be picked up in a level, read from a WAD file's THINGS lump."""
    data = wad.read_bytes()
    count, start = np.frombuffer(data, "<i4", 2, offset=4)
    lumps = np.frombuffer(data, np.dtype([("at", "<i4"), ("size", "<i4"), ("name", "S8")]), count, offset=start)
    at, size, name = lumps[int(np.flatnonzero(lumps["name"] == level.encode())[0]) + 1]
    if name != b"THINGS":
        raise ValueError(f"{wad}: {level} is no map of the classic format")
    x, y, _, kind, flags = np.frombuffer(data, "<i2", size // 2, offset=at).reshape(-1, 5).T
    return np.stack([x, y], axis=1)[np.isin(kind, _PICKUPS) & (flags & _MEDIUM > 0) & (flags & _MULTIPLAYER == 0)]


class Engine:
    """One VizDoom process in a working folder of its own. Use as a context manager."""

    def __init__(self, map_name: str, size_hw: tuple[int, int]) -> None:
        import vizdoom as vzd

        height, width = _engine_size(size_hw)
        wad, level = map_name.split("/")
        self._folder = tempfile.TemporaryDirectory(prefix="vgr-doom-")
        wad_file = Path(vzd.__file__).parent / f"{wad}.wad"
        # Asking the engine for its objects costs a sixth of every tic.
        self.places = pickup_places(wad_file, level)
        game = self.game = vzd.DoomGame()
        game.set_doom_game_path(str(wad_file))
        game.set_doom_config_path(str(Path(self._folder.name) / "vizdoom.ini"))
        game.set_doom_map(level)
        game.set_screen_resolution(getattr(vzd.ScreenResolution, f"RES_{width}X{height}"))
        game.set_screen_format(vzd.ScreenFormat.RGB24)
        game.set_depth_buffer_enabled(True)
        game.set_labels_buffer_enabled(True)
        for off in ("hud", "crosshair", "weapon", "screen_flashes", "messages",
                    "particles", "effects_sprites"):
            getattr(game, f"set_render_{off}")(False)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.add_game_args("-nosound +sv_cheats 1 +movebob 0 +cl_showsecretmessage 0 +con_midtime 0")
        button, variable = vzd.Button, vzd.GameVariable
        game.set_available_buttons(
            [button.MOVE_FORWARD_BACKWARD_DELTA, button.MOVE_LEFT_RIGHT_DELTA, button.TURN_LEFT_RIGHT_DELTA]
        )
        game.set_available_game_variables(
            [variable.POSITION_X, variable.POSITION_Y, variable.CAMERA_POSITION_Z, variable.ANGLE, variable.DEAD]
        )
        game.set_mode(vzd.Mode.PLAYER)
        game.set_episode_timeout(0)

    def __enter__(self) -> Engine:
        # The engine writes _vizdoom files where it stands when it starts.
        with _inside(self._folder.name):
            self.game.init()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):
            self.game.close()
        self._folder.cleanup()

    def restart(self, seed: int) -> Any:
        """A new episode; returns its first state after the tics in which the engine ignores turns."""
        self.game.set_seed(seed & 0x7FFFFFFF)
        with _inside(self._folder.name):
            self.game.new_episode()
        self.game.send_game_command("god")
        return self.act(tics=12)

    @property
    def over(self) -> bool:
        """True where the episode has ended or the walker is dead."""
        return self.game.is_episode_finished() or self.game.is_player_dead()

    def act(self, forward: float = 0.0, right: float = 0.0, turn_deg: float = 0.0, tics: int = 1) -> Any:
        """Moves for some tics and returns the state after them, or None where the level ended.

        forward and right are the speeds wished for in map units a tic (3 engine units a tic push to a steady
        speed of one map unit a tic); turn_deg is the turn of each tic, counter-clockwise.
        """
        self.game.make_action([3.0 * forward, 3.0 * right, -turn_deg], tics)
        return None if self.game.is_episode_finished() else self.game.get_state()


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class DoomSource:
    """Clips of VizDoom walks, whole maps held out for validation.

    Args: frames, size_hw and skip (engine tics a frame, fps = 35 / skip) of a clip; pace below 1 walks the same
    kind of path in slow motion, so that less leaves the view within a clip; depth keeps (F,H,W) planar depth in
    metres; clips_per_visit clips in a row share a map.
    """

    licence = "Freedoom maps and art: BSD-3-Clause, https://freedoom.github.io"

    def __init__(self, frames: int, size_hw: tuple[int, int], skip: int = 2, pace: float = 1.0, depth: bool = False,
                 clips_per_visit: int = 8) -> None:
        _engine_size((int(size_hw[0]), int(size_hw[1])))
        if not 0 < pace <= 1:
            raise ValueError(f"source.pace={pace}: must lie above 0 and at most at 1")
        if skip < 1 or frames < 1:
            raise ValueError(f"source.skip={skip}, source.frames={frames}: both must be at least 1")
        self.frames, self.size_hw, self.skip = frames, (int(size_hw[0]), int(size_hw[1])), skip
        self.pace, self.depth, self.clips_per_visit = pace, depth, clips_per_visit
        self.fps = TICS_PER_SECOND / skip
        self.splits = {"train": TRAIN_MAPS, "val": VAL_MAPS}

    def capture(self, seed: int, split: str, visit: int) -> list[Clip]:
        """The clips_per_visit clips of one visit: a pure function of (seed, split, visit)."""
        maps = self.splits[split]
        clips: list[Clip] = []
        # A map that gives less than one good clip in three tries is left for another.
        for retry in range(len(maps)):
            turn, place = divmod(visit, len(maps))
            name = maps[numpy_generator(seed, f"doom-maps-{split}", turn, retry).permutation(len(maps))[place]]
            with Engine(name, self.size_hw) as engine:
                good, attempt, fresh = 0, 0, True
                while attempt < 6 + 3 * good:
                    rng = numpy_generator(seed, f"doom-{split}", visit, retry, attempt)
                    clip = self._record(engine, name, rng, fresh)
                    # A new episode costs a tenth of a clip; a try that gave none leaves this one fit for another.
                    attempt, fresh = attempt + 1, clip is not None or engine.over
                    if clip is not None:
                        good += 1
                        clips.append(clip)
                    if len(clips) == self.clips_per_visit:
                        return clips
        raise RuntimeError(f"no map of {split} gave {self.clips_per_visit} good clips")

    def _record(self, engine: Engine, name: str, rng: np.random.Generator, fresh: bool) -> Clip | None:
        """One try at a clip, in a fresh episode or in the present one; None where it would be dull or broken."""
        mood, side = draw_mood(rng)
        if fresh:
            engine.restart(int(rng.integers(1 << 31)))
            if rng.random() < 0.6:
                engine.game.send_game_command("notarget")
        state = _start(engine, mood, side, rng)
        if state is None:
            return None
        walker = Walker(rng, mood, side, self.pace * self.skip / TICS_PER_SECOND)
        lead = int(rng.integers(4, 9))  # frames to get going, before the first that is kept
        kept: list[np.ndarray] = []
        poses, depths, seen, dull_views = [], [], [], 0
        before = np.array(state.game_variables[:2])
        for frame in range(lead + self.frames):
            now = np.array(state.game_variables[:2])
            moved = float(np.hypot(*(now - before))) / self.skip
            if state.game_variables[4] or moved > 24:  # dead, or teleported
                return None
            before = now
            # The walker lives in its own slower time: its clock, its speeds and what it hears of them are scaled.
            step = walker.step(free_space(state.depth_buffer), moved / self.pace)
            forward, right, turn = (self.pace * x for x in step)
            if frame >= lead:
                # Every fourth view is judged, and a clip is given up as soon as too many are dull.
                dull_views += (frame - lead) % 4 == 0 and dull(state)
                if dull_views > 0.15 * self.frames / 4:
                    return None
                kept.append(state.screen_buffer)
                poses.append(state.game_variables[:4])
                depths.append(state.depth_buffer)
                seen.append(state.labels if (frame - lead) % 8 == 0 else [])
            state = engine.act(forward, right, turn / TICS_PER_SECOND, self.skip)
            if state is None:
                return None
        depth_FHW = np.stack(depths)
        frames_FHWC = _shrink(kept, self.size_hw)
        return Clip(
            frames=frames_FHWC,
            c2w=np.stack([camera_to_world(*pose) for pose in poses]),
            intrinsics=np.tile(np.array([0.5, 0.8, 0.5, 0.5]), (self.frames, 1)),
            fps=self.fps,
            shots=[{"start": 0, "end": self.frames, "caption": describe(frames_FHWC, depth_FHW, seen, name)}],
            source={"name": "vizdoom", "map": name, "mood": mood},
            depth=metres(_shrink(list(depth_FHW), self.size_hw, nearest=True)) if self.depth else None,
        )


def _start(engine: Engine, mood: str, side: int, rng: np.random.Generator) -> Any:
    """Walks a while from some place of the map to a view that suits the mood; None where all is walls."""
    # Things to pick up lie where one can stand, all over the map, but often in corners: hence the walk.
    for _ in range(6):
        if len(engine.places):
            x, y = engine.places[int(rng.integers(len(engine.places)))]
            engine.game.send_game_command(f"warp {x} {y}")
        state = engine.act(turn_deg=float(rng.uniform(0, 360)))
        ahead_K = _look_round(engine, state, 4)
        if ahead_K is None or ahead_K.max() < 150:
            continue
        state = engine.act(turn_deg=90.0 * int(ahead_K.argmax()))
        walker = Walker(rng, "walk", side, _ROAM_TICS / TICS_PER_SECOND)
        for _ in range(int(rng.integers(6, 20))):
            if state is None:
                return None
            forward, right, turn = walker.step(free_space(state.depth_buffer), 99.0)
            state = engine.act(forward, right, turn / TICS_PER_SECOND, _ROAM_TICS)
        ahead_K = _look_round(engine, state, 8)
        if ahead_K is not None and ahead_K.max() > 200 and np.median(ahead_K) > 50:
            state = engine.act(turn_deg=45.0 * start_heading(ahead_K, mood, side, rng))
            if state is not None and not dull(state):
                return state
    return None


def _look_round(engine: Engine, state: Any, headings: int) -> np.ndarray | None:
    """Free distances ahead in so many headings, counter-clockwise from the present one; ends where it began."""
    ahead = []
    for _ in range(headings):
        if state is None:
            return None
        ahead.append(free_space(state.depth_buffer).ahead)
        state = engine.act(turn_deg=360.0 / headings)
    return np.array(ahead)


def _shrink(images: list[np.ndarray], size_hw: tuple[int, int], nearest: bool = False) -> np.ndarray:
    """Area averages (antialiasing), or for depth, which must not be averaged over edges, nearest samples."""
    import cv2

    how = cv2.INTER_NEAREST if nearest else cv2.INTER_AREA
    return np.stack([cv2.resize(image, size_hw[::-1], interpolation=how) for image in images])


def metres(depth_HW: np.ndarray) -> np.ndarray:
    """Planar depth in metres (float32) of the engine's 8-bit depth, good to about 0.2 m; the sky reads as 23 or 57 m.

    The buffer starts one to two steps late, a little differently on walls and floors; 1.5 is the compromise.
    """
    return ((depth_HW + 1.5) * (DEPTH_STEP / UNITS_PER_METRE)).astype(np.float32)


def dull(state: Any) -> bool:
    """True for a view that is near-blank or dark, a wall at arm's length (1.5 m), or one creature's chest."""
    depth_HW, grey_HW = state.depth_buffer, state.screen_buffer[::4, ::4, 1]
    height, width = depth_HW.shape
    middle = depth_HW[height // 3 : height * 2 // 3 : 2, width // 4 : width * 3 // 4 : 2]
    near = np.median(middle) * DEPTH_STEP < 1.5 * UNITS_PER_METRE
    crowded = any(
        label.object_category == "Monster" and label.width * label.height > 0.3 * depth_HW.size
        for label in state.labels
    )
    return bool(near or crowded or grey_HW.std() < 9 or grey_HW.mean() < 22)


def describe(frames_FHWC: np.ndarray, depth_FHW: np.ndarray, seen: list[list[Any]], map_name: str) -> str:
    """A caption of what stands there: light, colour, kind of place, map and things in sight; no camera words."""
    red, green, blue = frames_FHWC[::8].reshape(-1, 3).mean(axis=0)
    mean, spread = (red + green + blue) / 3, max(red, green, blue) - min(red, green, blue)
    light = "dark" if mean < 32 else "dim" if mean < 58 else "bright" if mean > 105 else ""
    if spread < 0.2 * mean:
        colour = "grey"
    elif green >= max(red, blue):
        colour = "green"
    elif blue >= max(red, green):
        colour = "blue"
    else:
        colour = "red" if green < 0.7 * red else "brown"
    height, width = depth_FHW.shape[1:]
    eye = depth_FHW[::8, height * 42 // 100 : height * 58 // 100].astype(np.float64) * DEPTH_STEP
    far, sides = eye.mean(), (eye[:, :, : width // 6].mean() + eye[:, :, -width // 6 :].mean()) / 2
    above = depth_FHW[::8, : height // 3]
    if np.isin(above, _SKY).mean() > 0.15:
        place = "yard under the open sky"
    else:
        place = "hall" if far > 420 else "corridor" if sides < 0.6 * far else "room" if far > 230 else "chamber"
    wad, level = map_name.split("/")
    level = f"map {int(level[3:])}" if level.startswith("MAP") else f"episode {level[1]} map {level[3]}"
    things = _things(seen, depth_FHW[0].size)
    return " ".join(filter(None, ("a", light, colour, place, "of", wad, level))) + (f" with {things}" if things else "")


def _things(seen: list[list[Any]], area: int) -> str:
    """Creatures first, then scenery, each with the most that stood in one frame: "two imps and a barrel"."""
    most: Counter[tuple[bool, str]] = Counter()
    for labels in seen:
        here: Counter[tuple[bool, str]] = Counter()
        for label in labels:
            creature = label.object_category == "Monster"
            known = creature or label.object_name in _NAMES
            if known and label.width * label.height > 0.002 * area:
                here[(creature, _NAMES.get(label.object_name, label.object_name.lower()))] += 1
        most |= here
    words = []
    for (_, name), count in sorted(most.items(), key=lambda item: (not item[0][0], -item[1], item[0][1]))[:3]:
        article = "an" if name[0] in "aeiou" else "a"
        words.append(f"{article} {name}" if count == 1 else
                     f"{_NUMBERS[count] if count < 5 else 'many'} {_plural(name)}")
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def _plural(name: str) -> str:
    if name.endswith("us"):
        return name[:-2] + "i"
    head, _, tail = name.partition(" of ")
    return f"{head}s of {tail}" if tail else f"{name}s"
