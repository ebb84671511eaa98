"""Camera paths by the rules of SANA-WM-Bench, for first frames of one's own: a folder that `vgr-bench requests=` takes.

    python -m benchmarks.paths --images frames --split hard --out requests_hard

The images' folder has <key>.png, .jpg, .jpeg or .webp, its <key>.caption.txt, and <key>.depth.npy where there is one:
planar depth (h,w) in metres, of any size, unknown where it is 0, negative or not finite. The i-th key in order of names
takes the i-th of its split's ten templates, beginning again after ten. --out gets pictures and captions as they are,
<key>.npz as the bench writes it (intrinsics in pixels), and revisits.json with at most five returns a path.

The rules are the paper's: 11 to 15 waypoints, centripetal Catmull-Rom positions and Squad rotations, arc length as
time, Laplacian smoothing, limits of 12 degrees/s, 0.4 m/s and 60 % of the scene's median depth, 0.3 m from every point
of the first frame, else 30 % smaller, three times at most. It prints neither the templates' shapes nor how the rules
meet, so these are our own choice and the paths are like the bench's, not the same:

  travel          the farthest distance from the start, and each path goes as far as the limits let it
  time            one speed in metres along a path, slower only where it would turn faster than the limit
  whip pan        a turn at the limit between steady views
  30 % smaller    positions alone, so that the path is slower too; turns stay
  still too near  an error that names the scenes: a path on the spot would not be what its name says
  short paths     turns shrink until they fit the time

  simple  arc, arc_rise      about the scene's middle, the median depth ahead; the second rises
          arc_sides          to one side, back through the start and to the other
          arc_walk           a sixth of a circle, looking where it walks
          s_curve, s_side    ahead, or to the side, past the middle
          s_back             s_curve and back again
          backtrack          ahead with a slow turn, and back
          backtrack_side     to the side and back, twice
          figure_eight       a lying eight that looks at the middle
  hard    full_turn, helix   a circle walked, looking where it walks; the second rises
          yaw_sweep          120 degrees to both sides on a way ahead and back
          elevator           straight up and down again
          pitch_swing        70 degrees up and down on a way ahead and back
          pitch_rise         rises and sinks on a way ahead, looking 75 degrees down on top
          whip_pans          whips 50 degrees to one side, 100 to the other and back, along s_curve
          whip_back          whips 90 degrees to one side and back, on a way ahead and back
          double_loop        one circle twice, looking from side to side
          crane              up and over to the other side, looking down
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from vgr.data.files import write_json
from vgr.geometry.camera_file import UNREADABLE, read_npy, square
from vgr.geometry.cameras import from_fov
from vgr.geometry.checks import DEGREES_PER_S, METRES_PER_S, check_cameras
from vgr.geometry.formats import write_cameras
from vgr.metrics.revisit import find_pairs
from vgr.seeding import numpy_generator
from vgr.types import Cameras

Array = NDArray[np.float64]

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SHARE, MARGIN_M, SMALLER, TRIES = 0.6, 0.3, 0.7, 3
AHEAD = 1 / SHARE  # the median depth, in a shape's unit: the farthest a path may go
GAP_S = 10.0  # between the frames of a return, as the bench's protocols here have it
JITTER, JITTER_DEG, STRETCH = 0.01, 1.0, 0.2  # of waypoints, and of a shape's three axes
TURNING = 0.9  # share of the time that turns may take
SPARE = 0.98  # share of the limit of turning, so that smoothing stays below it
SMOOTH_S = 0.5  # deviation of the smoothing
FINE = 100  # samples a segment, to measure it
MOST = 10_000  # frames: each is compared with each for returns


class Scene(NamedTuple):
    """A first frame: its name, picture, size in pixels, intrinsics (4,), and the file of its depth, if any."""

    key: str
    picture: Path
    size_hw: tuple[int, int]
    k: Tensor
    depth: Path | None


def shapes(u: Array) -> dict[str, dict[str, Array]]:
    """By split and template: right, down, ahead, degrees to the right and up (N,5) at progress u (N,) of a path."""
    phi, back = 2 * math.pi * u, (1 - np.cos(2 * math.pi * u)) / 2
    s, c, s2, c2, o = np.sin(phi), np.cos(phi), np.sin(2 * phi), np.cos(2 * phi), 0 * u

    def five(x: Array, y: Array, z: Array, yaw: Array | None = None, pitch: Array = o) -> Array:
        """Looks at the scene's middle where yaw is not told."""
        return np.stack([x, y, z, -np.rad2deg(np.arctan2(x, AHEAD - z)) if yaw is None else yaw, pitch], axis=-1)

    def arc(degrees: Array, y: Array = o, pitch: Array = o) -> Array:
        a = np.deg2rad(degrees)
        return five(AHEAD * np.sin(a), y, AHEAD * (1 - np.cos(a)), None, pitch)

    def whips(*stops: float) -> Array:
        return np.array(stops)[np.round(u * (len(stops) - 1)).astype(int)]

    simple = {
        "arc": arc(35 * u),
        "arc_rise": arc(30 * u, -0.3 * u, -10 * u),
        "arc_sides": arc(25 * s),
        "arc_walk": five(1 - np.cos(phi / 6), o, np.sin(phi / 6), 60 * u),
        "s_curve": five(0.2 * s, o, u),
        "s_side": five(u, o, 0.25 * s),
        "s_back": five(0.2 * np.sin(2 * math.pi * back), o, back),
        "backtrack": five(o, o, back, 25 * back),
        "backtrack_side": five((1 - c2) / 2, o, o),
        "figure_eight": five(s, o, 0.4 * s2),
    }
    hard = {
        "full_turn": five(1 - c, o, s, 360 * u),
        "helix": five(0.4 * (1 - c), -u, 0.4 * s, 360 * u),
        "yaw_sweep": five(o, o, back, 120 * s),
        "elevator": five(0.05 * s, -back, o, o, -25 * back),
        "pitch_swing": five(o, o, back, o, 70 * s),
        "pitch_rise": five(o, -0.7 * back, 0.7 * u, o, -75 * back),
        "whip_pans": five(0.2 * s, o, u, whips(0, 50, -50, 0)),
        "whip_back": five(o, o, back, whips(0, 90, 0)),
        "double_loop": five((1 - c2) / 2, o, s2 / 2, 45 * s2),
        "crane": five(0.8 * u, -0.8 * back, 0.3 * back, None, -45 * back),
    }
    return {"simple": simple, "hard": hard}


NAMES = {split: tuple(found) for split, found in shapes(np.zeros(1)).items()}


def catmull_rom(points_N3: Array, g: Array) -> Array:
    """The centripetal curve (G,3) through N points at g (G,), which is i at point i; Barry and Goldman's pyramid."""
    p = np.concatenate([2 * points_N3[:1] - points_N3[1:2], points_N3, 2 * points_N3[-1:] - points_N3[-2:-1]])
    knots = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(p, axis=0), axis=1) ** 0.5)])
    i = np.clip(g.astype(int), 0, len(points_N3) - 2)
    t = (knots[i + 1] + (g - i) * (knots[i + 2] - knots[i + 1]))[:, None]
    level = [p[i + j] for j in range(4)]
    for spans in (((0, 1), (1, 2), (2, 3)), ((0, 2), (1, 3)), ((1, 2),)):
        ends = [(knots[i + a, None], knots[i + b, None]) for a, b in spans]
        level = [((b - t) * x + (t - a) * y) / (b - a) for (a, b), x, y in zip(ends, level, level[1:])]
    return level[0]


def squad(turns_N: Rotation, g: Array) -> Rotation:
    """Shoemake's spherical quadrangle through N rotations at g (G,), which is i at rotation i; C1 in g."""

    def slerp(a: Rotation, b: Rotation, h: Array) -> Rotation:
        return a * Rotation.from_rotvec(h[:, None] * (a.inv() * b).as_rotvec())

    step = (turns_N[:-1].inv() * turns_N[1:]).as_rotvec()
    bend = np.zeros((len(turns_N), 3))  # none at the ends
    bend[1:-1] = (step[:-1] - step[1:]) / 4
    inner = turns_N * Rotation.from_rotvec(bend)
    i = np.clip(g.astype(int), 0, len(turns_N) - 2)
    h = g - i
    return slerp(slerp(turns_N[i], turns_N[i + 1], h), slerp(inner[i], inner[i + 1], h), 2 * h * (1 - h))


def waypoints(name: str, rng: np.random.Generator) -> Array:
    """A template's 11 to 15 rows of `shapes`, drawn a little differently each time; the first is all zeros."""
    count = int(rng.integers(11, 16))
    shape = next(found[name] for found in shapes(np.linspace(0, 1, count)).values() if name in found)
    shape[:, :3] *= rng.uniform(1 - STRETCH, 1 + STRETCH, 3)
    shape[1:] += rng.uniform(-1, 1, (count - 1, 5)) * ([JITTER] * 3 + [JITTER_DEG] * 2)
    shape[:, [0, 3]] *= rng.choice((-1, 1))  # to the left as often as to the right
    return shape


def unit_path(shape_N5: Array, frames: int, fps: float) -> Array:
    """Poses (F,4,4) along waypoints from the identity on, timed and smoothed, in the shape's unit of length."""
    count, angles, seconds = len(shape_N5), shape_N5[:, 3:], (frames - 1) / fps
    fine = np.linspace(0, count - 1, (count - 1) * FINE + 1)
    steps = np.linalg.norm(np.diff(catmull_rom(shape_N5[:, :3], fine), axis=0), axis=1)
    while True:
        turns = Rotation.from_euler("YX", angles, degrees=True)
        views = squad(turns, fine)
        degrees = np.rad2deg((views[:-1].inv() * views[1:]).magnitude())
        least = degrees / (SPARE * DEGREES_PER_S)  # seconds a step must take
        if least.sum() <= TURNING * seconds:
            break
        angles = 0.95 * angles

    def clock(pace: float) -> Array:
        """Seconds at the samples where a unit of length takes `pace` seconds, or longer in turns."""
        return np.concatenate([[0.0], np.cumsum(np.maximum(pace * steps, least))])

    pace = brentq(lambda x: clock(x)[-1] - seconds, 0, 1.01 * seconds / steps.sum())
    g = np.interp(np.linspace(0, clock(pace)[-1], frames), clock(pace), fine)
    quaternions = squad(turns, g).as_quat()
    # A quaternion and its negative are one rotation: neighbours get one sign, so that they can be averaged.
    quaternions[1:] *= np.cumprod(np.where((quaternions[1:] * quaternions[:-1]).sum(1) < 0, -1, 1))[:, None]
    rows = np.concatenate([catmull_rom(shape_N5[:, :3], g), quaternions], axis=1)
    for _ in range(round(2 * (SMOOTH_S * fps) ** 2)):  # each adds a variance of half a frame squared
        rows[1:-1] += (rows[:-2] - 2 * rows[1:-1] + rows[2:]) / 4
    return square(np.concatenate([Rotation.from_quat(rows[:, 3:]).as_matrix(), rows[:, :3, None]], axis=2))


def place(c2w_F44: Array, fps: float, depth_m: float, points_P3: Array | None) -> tuple[Array, int]:
    """A unit path in metres, and how often it was made smaller; TRIES + 1 where it still is too near the points."""
    c2w, centres = c2w_F44.copy(), c2w_F44[:, :3, 3]
    fastest = np.linalg.norm(np.diff(centres, axis=0), axis=1).max() * fps
    size = min(SHARE * depth_m / np.linalg.norm(centres, axis=1).max(), METRES_PER_S / fastest)
    tree = KDTree(np.zeros((0, 3)) if points_P3 is None else points_P3)
    for tries in range(TRIES + 1):
        c2w[:, :3, 3] = size * SMALLER**tries * centres
        if tree.query(c2w[:, :3, 3])[0].min() >= MARGIN_M:
            return c2w, tries
    return c2w, TRIES + 1


def read_scenes(folder: Path, fps: float, fov_deg: float) -> list[Scene]:
    """In the order of their names. FileNotFoundError or ValueError say what lies there instead."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder} is no folder; give one of first frames and their captions")
    pictures = sorted((p for p in folder.iterdir() if p.suffix in PICTURES), key=lambda p: (p.stem, p.suffix))
    if not pictures:
        raise ValueError(f"--images {folder} holds no <key>{', '.join(PICTURES)}; put first frames there")
    for a, b in zip(pictures, pictures[1:]):
        if a.stem == b.stem:
            raise ValueError(f"{a} and {b.name} have one key; a scene has one picture, take one away")
    return [read_scene(p, fps, fov_deg) for p in pictures]


def read_scene(picture: Path, fps: float, fov_deg: float) -> Scene:
    key = picture.stem
    caption = picture.with_name(f"{key}.caption.txt")
    try:
        told = caption.read_text(encoding="utf-8") if caption.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{caption} is no UTF-8 text ({error.reason}); save it as UTF-8") from error
    if not told.strip():
        raise ValueError(f"{picture} has no caption; write one, a line a shot, into {caption.name} beside it")
    image = cv2.imread(str(picture))
    if image is None:
        raise ValueError(f"{picture} is no image that can be read; give a PNG, JPEG or WebP file")
    size_hw = image.shape[:2]
    k = from_fov(fov_deg, size_hw[1] / size_hw[0], torch.float64)
    try:
        check_cameras(Cameras(torch.eye(4)[None, None], k[None, None]), fps, size_hw)
    except ValueError as error:
        raise ValueError(f"{picture} at --fov-deg {fov_deg:g} and --fps {fps:g}: {error}") from error
    depth = picture.with_name(f"{key}.depth.npy")
    return Scene(key, picture, size_hw, k, depth if depth.is_file() else None)


def read_depth(path: Path, k: Array) -> tuple[float, Array]:
    """Median of a depth map's known values, and its points that lie no further than a path and its margin can come."""
    try:
        z = np.asarray(read_npy(path.read_bytes()), np.float64)
    except UNREADABLE as error:
        raise ValueError(f"{path} is no array that can be read ({error}); give planar depth (h,w) in metres") from error
    known = np.isfinite(z) & (z > 0)
    if z.ndim != 2 or not known.any():
        raise ValueError(f"{path} is {z.shape} with {known.sum()} known values; give planar depth (h,w) in metres")
    (rows, columns), z = np.nonzero(known), z[known]
    x, y = ((columns + 0.5) / known.shape[1] - k[2]) / k[0], ((rows + 0.5) / known.shape[0] - k[3]) / k[1]
    points, median = np.stack([x * z, y * z, z], axis=1), float(np.median(z))
    return median, points[np.linalg.norm(points, axis=1) < SHARE * median + MARGIN_M]


def make(args: argparse.Namespace) -> None:
    """Everything is read, made and checked before anything is written, and the folder appears whole."""
    out = args.out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out {args.out} is there and not an empty folder; give a new one")
    for flag, value in (("--seconds", args.seconds), ("--fps", args.fps), ("--depth-m", args.depth_m)):
        if not 0 < value < math.inf:
            raise ValueError(f"{flag} {value:g} must be a number above 0")
    frames = 1 + round(args.seconds * args.fps)
    if not 2 <= frames <= MOST:
        raise ValueError(f"--seconds {args.seconds:g} at --fps {args.fps:g} is {frames} frames; give 2 to {MOST}")
    made, near = [], []
    for i, scene in enumerate(read_scenes(args.images, args.fps, args.fov_deg)):
        name = NAMES[args.split][i % len(NAMES[args.split])]
        shape = waypoints(name, numpy_generator(args.seed, f"paths {args.split}", i))
        seen = (args.depth_m, None) if scene.depth is None else read_depth(scene.depth, scene.k.numpy())
        c2w, tries = place(unit_path(shape, frames, args.fps), args.fps, *seen)
        made.append((scene, name, c2w, tries))
        near += [f"{name} of {scene.key}"] if tries > TRIES else []
    if near:
        raise ValueError(
            f"{', '.join(near)}: within {MARGIN_M:g} m of what the first frame shows, although made 30 % smaller "
            f"{TRIES} times; give another --seed, or take these pictures away"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as spare:
        folder = Path(spare) / "made"  # with the usual rights, which the one around it has not
        folder.mkdir()
        returns = {s.key: write(folder, s, name, c2w, tries, args.fps) for s, name, c2w, tries in made}
        write_json(folder / "revisits.json", returns)
        folder.replace(out)


def write(folder: Path, scene: Scene, name: str, c2w: Array, tries: int, fps: float) -> dict[str, object]:
    """One scene's files; says what it is, and returns its row of revisits.json."""
    for file in (scene.picture, scene.picture.with_name(f"{scene.key}.caption.txt")):
        shutil.copyfile(file, folder / file.name)
    cameras = Cameras(torch.from_numpy(c2w)[None], scene.k.expand(1, len(c2w), 4))
    write_cameras(folder / f"{scene.key}.npz", cameras, fps, "sana_wm_bench", size_hw=scene.size_hw)
    pairs = [[p.first, p.second] for p in find_pairs(c2w, fps, GAP_S)]
    far = np.linalg.norm(c2w[:, :3, 3], axis=1).max()
    checked = "no depth, so no collision check" if scene.depth is None else f"made smaller {tries} times"
    print(f"{scene.key}: {name}, {far:.2f} m away at most, {len(pairs)} returns; {checked}", flush=True)
    return {"template": name, "smaller": tries, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--split", choices=tuple(NAMES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--fov-deg", type=float, default=60.0, help="across the pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--depth-m", type=float, default=5.0, help="median depth of scenes without a depth map")
    try:
        make(parser.parse_args())
    except (ValueError, OSError) as error:
        parser.exit(2, f"benchmarks.paths: error: {error}\n")


if __name__ == "__main__":
    main()
