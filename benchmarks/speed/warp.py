"""The forward warp beside a packed-key point splat and the published 4x4 mesh: seconds, and how often each is right.

    python -m benchmarks.speed.warp --out benchmarks/results/speed_warp_cpu.json
    python -m benchmarks.speed.warp --rooms 8     # how right ours is, of no time

One frame of a procedural room along an eased 15 degree orbit. All sides run once to warm up, then in turn `--repeats`
times; ratios are of adjacent pairs, peer / ours: above 1, ours is faster. The point splat is the least there is, a
sample a pixel with its colour, and no filling. The published mesh is `warp` by its published rules, whose depth and
winner come from one packed key as well. Beside the times: the share of pixels whose visibility is right in the last
frame, and the PSNR there of what is seen. --rooms: the same two of our rules, over rooms and `moves`, the worst of each
move and in which rooms visibility is right at less than 99 %.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from vgr.data.files import write_json
from vgr.data.worlds import Scene
from vgr.geometry.splat import land, pixel_centres, pixel_map
from vgr.geometry.trajectories import named_cameras
from vgr.geometry.warp import Keyframes, median_depth, warp
from vgr.geometry.warp_published import nearest_sample

Array = NDArray[np.float64]


class Room:
    """A procedural room, one camera in it, and what that camera sees: image (H,W,3) uint8, depth (H,W) in metres.

    The camera stands in the middle at a height of 1.4 m and looks where most things are, a little down.
    """

    def __init__(self, seed: int, size_hw: tuple[int, int]) -> None:
        self.scene, self.size_hw = Scene(np.random.default_rng(seed)), size_hw
        self.k: Array = np.array([0.7, 0.7 * size_hw[1] / size_hw[0], 0.5, 0.5])
        views = np.tile(np.eye(4), (24, 1, 1))
        views[:, :3, :3] = Rotation.from_euler("YX", [(15 * i, -8) for i in range(24)], degrees=True).as_matrix()
        views[:, 1, 3] = -1.4
        self.c2w: Array = max(views, key=lambda c2w: (self.scene.which(c2w, self.k, 0.0, (24, 40)) > 0).sum())
        self.image = self.scene.render(self.c2w, self.k, 0.0, size_hw)
        self.depth = self.scene.depth(self.c2w, self.k, 0.0, size_hw)

    def keyframes(self, device: str = "cpu") -> Keyframes:
        image = self.image.transpose(2, 0, 1) / np.float32(255)
        parts = (image, self.depth, self.k, self.c2w)
        return Keyframes(*(torch.from_numpy(x)[None].to(device) for x in parts))

    def path(self, name: str, frames: int, **amplitude: float) -> Array:
        """A named path from the room's camera, c2w (F,4,4)."""
        return self.c2w @ named_cameras(name, frames, 16.0, **amplitude)[0].numpy()

    def truth(self, c2w_44: Array) -> tuple[Array, NDArray[np.bool_], Array]:
        """From another camera: depth (H,W), which of the surface points the room's camera sees (H,W), those within its
        frame to which its line of sight is free, and at which x and y, in its pixels, they stand (2,H,W)."""
        height, width = self.size_hw
        depth = self.scene.depth(c2w_44, self.k, 0.0, self.size_hw).astype(np.float64)
        v, u = (((np.arange(n) + 0.5) / n - c) / f for n, c, f in zip(self.size_hw, self.k[[3, 2]], self.k[[1, 0]]))
        rays = np.stack([*np.meshgrid(u, v), np.ones(self.size_hw)], axis=-1) * depth[..., None]
        way = rays @ c2w_44[:3, :3].T + c2w_44[:3, 3] - self.c2w[:3, 3]
        x, y, z = np.moveaxis(way @ self.c2w[:3, :3], -1, 0)
        at = np.stack([(x / z * self.k[0] + self.k[2]) * width, (y / z * self.k[1] + self.k[3]) * height])
        inside = (z > 0) & (at >= 0).all(0) & (at[0] < width) & (at[1] < height)
        hit, _, _ = self.scene.cast(self.c2w[:3, 3], way.reshape(-1, 3), 0.0)
        return depth, inside & (hit.reshape(self.size_hw) > 1 - 1e-3), at


def point_splat(keyframes: Keyframes, c2w_F44: Tensor, k_F4: Tensor) -> tuple[Tensor, Tensor]:
    """Images (F,C,H,W) and visible (F,H,W): one keyframe's pixels where they land, black where none does."""
    size_hw, device = tuple(keyframes.depth.shape[1:]), keyframes.depth.device
    points = (keyframes.depth[0] * pixel_centres(size_hw, device)).flatten(1)
    colours, found = keyframes.images[0].flatten(1), []
    for there in pixel_map(keyframes.c2w, keyframes.intrinsics, c2w_F44, k_F4, size_hw):
        winner, seen = (x[1:-1, 1:-1] for x in nearest_sample(*land(points, there, size_hw), size_hw))
        found.append((colours[:, winner] * seen, seen))
    images, visible = zip(*found)
    return torch.stack(images), torch.stack(visible)


Side = Callable[[], tuple[Tensor, Tensor]]


def sides(keyframes: Keyframes, c2w_F44: Tensor, k_F4: Tensor) -> dict[str, Side]:
    """Ours at its default first, then the peers, then ours with other numbers of samples."""

    def ours(**settings: Any) -> Side:  # noqa: ANN401
        def side() -> tuple[Tensor, Tensor]:
            found = warp(keyframes, c2w_F44, k_F4, **settings)
            return found.images, found.visible

        return side

    return {
        "ours": ours(), "point splat": lambda: point_splat(keyframes, c2w_F44, k_F4),
        "published 4x4 mesh": ours(rules="published"),
        "ours, 1x1": ours(samples=1), "ours, 3x3": ours(samples=3), "ours, 4x4": ours(samples=4),
    }  # fmt: skip


def seconds(side: Side, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    side()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def moves(m: float) -> dict[str, tuple[str, dict[str, float]]]:
    """What is asked of a warp at a median depth of m: 0.15 of it along each axis, 15 degrees of orbit, 6 of turning."""
    along = {f"{name} {sign:+g}": (name, {"distance": 0.15 * sign * m}) for name, sign in (
        ("dolly", 1), ("dolly", -1), ("truck", 1), ("pedestal", 1))}  # fmt: skip
    orbits = {f"orbit {a:+d}": ("orbit", {"distance": m, "angle_deg": float(a)}) for a in (15, -15)}
    return {**along, **orbits, "pan": ("pan", {"angle_deg": 6.0}), "tilt": ("tilt", {"angle_deg": 6.0})}


def judge(size_hw: tuple[int, int], rooms: int) -> list[dict[str, Any]]:
    """A row a move: visibility right in % and PSNR in dB of each room."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(rooms):
        room = Room(seed, size_hw)
        for name, (path, amplitude) in moves(median_depth(torch.from_numpy(room.depth))).items():
            c2w = room.path(path, 2, **amplitude)[-1]
            _, seen, _ = room.truth(c2w)
            true = room.scene.render(c2w, room.k, 0.0, size_hw) / 255
            made = warp(room.keyframes(), torch.from_numpy(c2w)[None], torch.from_numpy(room.k)[None])
            image, visible = made.images[0].permute(1, 2, 0).numpy(), made.visible[0].numpy()
            row = found.setdefault(name, {"visibility_right_percent": [], "psnr_db": []})
            row["visibility_right_percent"].append(100 * float((visible == seen).mean()))
            row["psnr_db"].append(-10 * float(np.log10(((image - true) ** 2)[visible & seen].mean())))
    for name, row in found.items():
        right = row["visibility_right_percent"]
        below = [seed for seed, share in enumerate(right) if share < 99]
        print(f"{name:12s} visibility right {min(right):.2f} to {max(right):.2f} %, below 99 % in rooms "
              f"{below or 'none'}; least PSNR {min(row['psnr_db']):.1f} dB", flush=True)
    return [{"move": name, "size_hw": size_hw, **row} for name, row in found.items()]


def measure(size_hw: tuple[int, int], frames: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """A row a side: its seconds, its ratio to ours, and how right its last frame is."""
    room = Room(0, size_hw)
    path = room.path("orbit", frames, distance=median_depth(torch.from_numpy(room.depth)), angle_deg=15)
    _, seen, _ = room.truth(path[-1])
    true = room.scene.render(path[-1], room.k, 0.0, size_hw) / 255
    k_F4 = torch.from_numpy(room.k).to(device).expand(frames, 4)
    forms = sides(room.keyframes(device), torch.from_numpy(path).to(device), k_F4)
    rows = []
    for name, side in forms.items():
        image, visible = (x[-1].cpu().numpy() for x in side())
        error = ((image.transpose(1, 2, 0) - true) ** 2)[visible & seen].mean()
        rows.append({"side": name, "frames": frames, "size_hw": size_hw,
                     "visibility_right_percent": 100 * float((visible == seen).mean()),
                     "psnr_db": -10 * float(np.log10(error))})  # fmt: skip
    times = [[seconds(side, device) for side in forms.values()] for _ in range(repeats)]
    for i, row in enumerate(rows):
        ratios = sorted(one[i] / one[0] for one in times)
        row |= {"s": median(one[i] for one in times), "pairs": repeats, "ratio_median": median(ratios),
                "ratio_min": ratios[0], "ratio_max": ratios[-1]}  # fmt: skip
        row["frames_per_s"] = frames / row["s"]
        print(f"{row['side']:20s} {row['s']:8.3f} s  {row['frames_per_s']:6.1f} frames/s  "
              f"ratio {row['ratio_median']:6.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
              f"visibility right {row['visibility_right_percent']:.2f} %  {row['psnr_db']:.1f} dB",
              flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", nargs=2, type=int, default=(384, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rooms", type=int, default=0, help="judge ours in so many rooms, and time nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()
    size_hw = tuple(args.size)
    rows = judge(size_hw, args.rooms) if args.rooms else measure(size_hw, args.frames, args.repeats, args.device)
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu, "load": load,
        "versions": {"torch": metadata.version("torch"), "python": platform.python_version()}, "rows": rows,
    }  # fmt: skip
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
