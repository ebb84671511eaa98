"""Does a frozen model follow the camera when it is shown warps, and what does a LoRA of one video add?

    python -m benchmarks.warp_adapter --write clips/walk.mp4
    vgr-train experiments=warp_adapter/tiny data.video=clips/walk.mp4 data.source.cameras=files data.source.depth=files
    python -m benchmarks.warp_adapter --adapter runs/warp_adapter/<run>/seed1 --out benchmarks/results/warp_adapter.json

--write: one walk of a training map, with its poses and depth beside it, that is the one video. Then held-out maps: each
clip is made again from its first frame along its own camera, by every arm with the same noise, on a base of stages
(Helios) or a causal video model, as the adapter's is. Depth is the engine's (8 bits, good to 0.2 m), of the true clip
at each keyframe. Measured against the true clip: PSNR where the first frame's warp sees, PSNR where it does not, and
how far the camera is from where it was told to be, degrees and metres, by direct alignment with the first frame
(`benchmarks.alignment`) of every fourth frame in which at least half is of the first. Alignment also starts from where
the camera was told to be, so errors are rather told too small. True video through the codec is the ceiling, a video
that stands still the floor. Differences are paired over clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.alignment import pose_errors, track
from vgr.command import tracked
from vgr.data.doom import DoomSource
from vgr.data.files import write_json
from vgr.data.video import Clip, write_video
from vgr.diffusion.pyramid import Streamed
from vgr.diffusion.rollout import Session
from vgr.diffusion.samplers import FrameNoise, frame_noise
from vgr.diffusion.timesteps import sigma_grid
from vgr.geometry.cameras import relative_to_first
from vgr.geometry.formats import write_cameras
from vgr.geometry.warp import Keyframes, warp
from vgr.metrics.statistics import mean_interval, paired
from vgr.models.warp_adapter import WarpEvidence, where_shown, with_evidence
from vgr.seeding import derive_seed
from vgr.training import checkpoints, rebuild
from vgr.types import Cameras, Conditioning, Denoiser, HistoryBlock

SIZE_HW, WINDOW = (96, 128), 49
CEILING, STILL = "true, through the codec", "still"
# Better: higher PSNR, lower errors.
METRICS = ("psnr_seen_db", "psnr_unseen_db", "align_rot_deg", "align_trans_m")


@dataclass(frozen=True)
class Arm:
    """What it does of the method; rule, threshold: of the tokens kept, None as trained; against: what it is compared
    with."""

    against: str = "LoRA"
    adapted: bool = True
    warped: bool = True
    aligned: bool = True  # warps at the positions of what they show
    dropping: bool = True  # of tokens that are not seen
    rule: str | None = None
    threshold: float | None = None
    early: bool = True  # warps at high noise alone, or in the first stage


ARMS = {
    "frozen": Arm(STILL, adapted=False, warped=False),
    "zero-shot": Arm("frozen", adapted=False),
    "LoRA": Arm("zero-shot"),
    "LoRA, not aligned": Arm(aligned=False),
    "LoRA, all tokens kept": Arm(dropping=False),
    "LoRA, seen at centers": Arm(rule="center"),
    "LoRA, half seen": Arm(threshold=0.5),
    "zero-shot, at all noise": Arm("zero-shot", adapted=False, early=False),
    "LoRA, at all noise": Arm("zero-shot, at all noise", early=False),
}


def source(frames: int) -> DoomSource:
    return DoomSource(frames=frames, size_hw=SIZE_HW, skip=2, pace=0.5, depth=True, clips_per_visit=4)


def write_walk(path: Path, index: int) -> None:
    """The one video: a walk of a training map, `index` among the visits, as mp4, poses and depth."""
    clip = source(97).capture(1, "train", index)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, clip.frames, clip.fps, crf=10)
    cameras = Cameras(*(torch.from_numpy(x)[None] for x in (clip.c2w, clip.intrinsics)))
    write_cameras(path.with_suffix(".npz"), cameras, clip.fps)
    np.savez(path.with_suffix(".depth.npz"), depth=clip.depth)
    print(f"{path}: {clip.shots[0]['caption']}")


def held_out(count: int) -> Iterator[Clip]:
    """Walks of held-out maps that go at least a metre: what stands still asks nothing of a camera."""
    found, visit = 0, 0
    while found < count:
        for clip in source(WINDOW).capture(1, "val", visit):
            if found < count and np.linalg.norm(np.diff(clip.c2w[:, :3, 3], axis=0), axis=1).sum() >= 1:
                found += 1
                yield clip
        visit += 1


class Arms:
    """The frozen base and the same with adapters, and what each arm makes of a clip's first frame and camera."""

    def __init__(self, adapter: Path, device: str) -> None:
        checkpoint = checkpoints.resolve(adapter)
        self.record = checkpoints.read_generator(checkpoint)
        self.adapted = rebuild.rebuild(checkpoint)
        self.base = rebuild.rebuild(checkpoints.resolve(Path(self.record["lora"]["base"])))
        self.device = device
        for parts in (self.adapted, self.base):
            for part in ("model", "text", "codec"):
                parts[part] = parts[part].to(device).eval()
        self.stages = getattr(self.base["model"], "stages", 0)

    @property
    def names(self) -> list[str]:
        """The arms this base has: a causal one refuses warps at other positions than its targets'."""
        return [name for name, arm in ARMS.items() if arm.aligned or self.stages]

    @torch.no_grad()
    def make(self, name: str, clip: Clip, seed: int) -> np.ndarray:
        """Frames (F,H,W,3) uint8."""
        arm, codec, depth = ARMS[name], self.base["codec"], torch.from_numpy(clip.depth)
        select = self.record["evidence"] | {k: v for k in ("rule", "threshold") if (v := getattr(arm, k)) is not None}
        warps = WarpEvidence(cameras_of(clip), lambda _, n: depth[n], codec, seed=seed, rescale=False, **select)

        def evidence(cond: Conditioning, before: Tensor | None) -> tuple[HistoryBlock, ...]:
            blocks = warps(cond, before)
            return blocks if arm.dropping else tuple(dataclasses.replace(block, keep=None) for block in blocks)

        shape = (codec.channels, SIZE_HW[0] // codec.stride[1], SIZE_HW[1] // codec.stride[2])
        sampling = self.record["sampling"]
        sigmas = torch.tensor([1.0, 0.0]) if self.stages else sigma_grid(sampling["steps"], sampling["shift"])
        session = Session(
            self._denoiser(arm, frame_noise([seed], shape, self.device)), codec, self.base["text"], sigmas=sigmas,
            chunk=self.record["chunk"], fps=clip.fps, size_hw=SIZE_HW, seed=seed, device=self.device,
            first_frame=torch.from_numpy(clip.frames[0]), evidence=evidence if arm.warped else None,
        )  # fmt: skip
        session.append(clip.shots[0]["caption"], (len(clip.frames) - 1) / clip.fps)
        return torch.cat(list(session.frames())).numpy()

    def _denoiser(self, arm: Arm, noise: FrameNoise) -> Denoiser:
        """The base, and the arm's model where it is shown warps."""
        frozen = self.base["model"]
        model = self.adapted["model"] if arm.adapted else frozen
        if not self.stages:
            model = where_shown(model, frozen)
            return with_evidence(model) if arm.early else with_evidence(model, from_time=0.0)
        model = model if arm.aligned else unaligned(model)
        steps = (self.record["sampling"]["steps"],) * self.stages
        return Streamed(frozen, noise, steps, coarse=model, shown=1 if arm.early else self.stages)

    def ceiling(self, clip: Clip) -> np.ndarray:
        """The true clip through the codec."""
        video = torch.from_numpy(clip.frames).permute(3, 0, 1, 2)[None].float().to(self.device) / 127.5 - 1
        back = self.base["codec"].decode(self.base["codec"].encode(video))[0].clamp(-1, 1)
        return back.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def unaligned(model: Any) -> Any:
    """The target's indices behind its evidence instead of beside it: as seen from the target, all else a chunk ago."""

    def call(x: Tensor, t: Tensor, cond: Conditioning, state: Any = None) -> tuple[Tensor, Any]:
        def moved(block: HistoryBlock) -> HistoryBlock:
            return dataclasses.replace(block, position=block.position - x.shape[2])

        return model(x, t, dataclasses.replace(cond, history=tuple(map(moved, cond.history))), state)

    return call


def cameras_of(clip: Clip) -> Cameras:
    c2w, k = (torch.from_numpy(x)[None] for x in (clip.c2w, clip.intrinsics))
    return Cameras(relative_to_first(c2w).float(), k.float())


def seen_from_first(clip: Clip) -> np.ndarray:
    """(F,H,W) bool: what of each frame the first one shows."""
    cameras, image = cameras_of(clip), torch.zeros(1, 3, *SIZE_HW)
    first = Keyframes(image, torch.from_numpy(clip.depth[:1]), cameras.intrinsics[0, :1], cameras.c2w[0, :1])
    return warp(first, cameras.c2w[0], cameras.intrinsics[0]).visible.numpy()


def camera_errors(made: np.ndarray, clip: Clip, seen: np.ndarray) -> dict[str, float]:
    """Of a frame for each latent frame, as far as half of it is seen from the first (the next one in any case)."""
    at = np.arange(0, len(made), 4)
    kept = at[(seen[at].mean((1, 2)) >= 0.5) | (at <= 4)]
    found = track(made[at], clip.depth[0], clip.intrinsics[0], told_F44=clip.c2w[at], relit=True)
    return pose_errors(found[kept // 4], clip.c2w[kept])


def measure(made: np.ndarray, clip: Clip, seen: np.ndarray) -> dict[str, float]:
    """METRICS of frames behind the first."""
    square = ((made[1:].astype(np.float64) - clip.frames[1:]) ** 2).mean(-1)

    def psnr(where: np.ndarray) -> float:
        with np.errstate(divide="ignore"):
            return float(10 * np.log10(255**2 / square[where].mean())) if where.any() else float("nan")

    return {"psnr_seen_db": psnr(seen[1:]), "psnr_unseen_db": psnr(~seen[1:])} | camera_errors(made, clip, seen)


def line(name: str, told: dict[str, Any]) -> str:
    text = f"{name} {told['value']:.2f}"
    if "difference" not in told:
        return text
    value, low, high = (told["difference"][k] for k in ("value", "low", "high"))
    return f"{text} ({value:+.2f}, {low:+.2f} to {high:+.2f})"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each arm the mean of each metric with its interval, and its paired difference to the arm it is against."""
    found: dict[str, Any] = {}
    for name in (key for key in rows[0] if key != "seen"):
        columns = {m: np.array([row[name][m] for row in rows]) for m in METRICS}
        told = found[name] = {m: mean_interval(x)._asdict() for m, x in columns.items()}
        less = ARMS[name].against if name in ARMS else ""
        if less in rows[0]:
            told["against"] = less
            for m, x in columns.items():
                difference, p, _ = paired(x, np.array([row[less][m] for row in rows]))
                told[m] |= {"difference": difference._asdict(), "p": p}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the one video here, and end")
    parser.add_argument("--walk", type=int, default=3, help="which walk of the training maps that is")
    parser.add_argument("--adapter", type=Path, help="a run of warp_adapter/tiny, of either base")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="some of the arms; all that the base has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sheet", type=Path, help="a folder for what was made of the first clips, arm beside arm, mp4")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.write is not None:
        write_walk(args.write, args.walk)
        return
    arms, rows, start = Arms(args.adapter, args.device), [], time.time()
    names = [name for name in arms.names if not args.arms or name in args.arms]
    if left := [name for name in args.arms or ARMS if name not in names]:
        print(f"left out, as this base takes warps at its targets' positions alone: {'; '.join(left)}", flush=True)
    for number, clip in enumerate(tracked(list(held_out(args.clips)), "clips")):
        seen = seen_from_first(clip)
        shown = {CEILING: arms.ceiling(clip), STILL: clip.frames[:1].repeat(len(clip.frames), 0)}
        shown |= {arm: arms.make(arm, clip, derive_seed(1, "warp_adapter", number)) for arm in names}
        row = {name: measure(made, clip, seen) for name, made in shown.items()}
        rows.append({"seen": float(seen[1:].mean())} | row)
        if args.sheet is not None and number < 4:
            args.sheet.mkdir(parents=True, exist_ok=True)
            pictures = np.concatenate([clip.frames, *shown.values()], axis=2)
            write_video(args.sheet / f"{number}.mp4", pictures, clip.fps)
    found = {"clips": len(rows), "seen": float(np.mean([row["seen"] for row in rows])), "arms": summary(rows)}
    for name, told in found["arms"].items():
        print(f"{name:24s} " + "  ".join(map(line, METRICS, map(told.get, METRICS))), flush=True)
    digest = checkpoints.weights_hash(checkpoints.resolve(args.adapter))
    about = {"model": arms.record["model"]["class"], "base": arms.record["lora"]["sha256"], "adapter": digest,
             "sampling": arms.record["sampling"], "device": args.device, "seconds": time.time() - start,
             "python": platform.python_version()}  # fmt: skip
    found |= about | {"versions": {p: version(p) for p in ("torch", "diffusers", "vizdoom")}}
    if args.out:
        write_json(args.out, found | {"rows": rows})


if __name__ == "__main__":
    main()
