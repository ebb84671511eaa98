"""Does a frozen model follow the camera when it is shown warps, and what does a LoRA of one video add?

    python -m benchmarks.warp_adapter --write clips/walk.mp4
    vgr-train experiments=warp_adapter/tiny data.video=clips/walk.mp4 data.source.cameras=files data.source.depth=files
    python -m benchmarks.warp_adapter --adapter runs/warp_adapter/<run>/seed1 --out benchmarks/results/warp_adapter.json

--write: one walk of a training map, with its poses and depth beside it, that is the one video. Then held-out maps: each
clip is made again from its first frame along its own camera, by every arm with the same noise. Depth is the engine's
(8 bits, good to 0.2 m), of the true clip at each keyframe. Measured against the true clip: PSNR where the first frame's
warp sees, PSNR where it does not, and by flow the rotation and heading of each step against the camera's, as
`vgr-bench protocol=smoke` has them; true video through the codec is the ceiling. Differences are paired over clips.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vgr.command import tracked
from vgr.data.doom import DoomSource
from vgr.data.files import write_json
from vgr.data.video import Clip, write_video
from vgr.diffusion.pyramid import Streamed
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import frame_noise
from vgr.geometry.cameras import relative_to_first
from vgr.geometry.formats import write_cameras
from vgr.geometry.warp import Keyframes, warp
from vgr.metrics.egomotion import flow_rotation, score_motion
from vgr.metrics.statistics import mean_interval, paired
from vgr.models.warp_adapter import WarpEvidence
from vgr.seeding import derive_seed
from vgr.training import checkpoints, rebuild
from vgr.training.conditioning import conditioning
from vgr.types import Cameras, Conditioning, HistoryBlock

SIZE_HW, WINDOW, STEPS = (96, 128), 49, 6
ARMS = ("frozen", "zero-shot", "LoRA", "LoRA, not aligned", "LoRA, all tokens kept")
# Better: higher PSNR, lower angles.
METRICS = ("psnr_seen_db", "psnr_unseen_db", "rot_step_mean_deg", "heading_imputed_deg")


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

    @torch.no_grad()
    def make(self, arm: str, clip: Clip, seed: int) -> np.ndarray:
        """Frames (F,H,W,3) uint8."""
        model, codec, depth = self.base["model"], self.base["codec"], torch.from_numpy(clip.depth)
        cameras = cameras_of(clip)
        shot = torch.zeros(1, codec.latent_frames(WINDOW), dtype=torch.int64)
        captions = ((clip.shots[0]["caption"],),)
        cond = conditioning(self.base["text"], captions, cameras, shot, codec.stride[0], self.record["chunk"])
        noise = frame_noise([seed], (codec.channels, SIZE_HW[0] // codec.stride[1], SIZE_HW[1] // codec.stride[2]),
                            self.device)  # fmt: skip
        coarse = self.adapted["model"] if arm.startswith("LoRA") else model
        if arm == "LoRA, not aligned":
            coarse = unaligned(coarse)
        denoiser = Streamed(model, noise, (STEPS,) * model.stages, coarse=coarse)
        evidence = WarpEvidence(cameras, lambda _, frame: depth[frame], codec, seed=seed, rescale=False)
        decode, pieces, state = codec.stream(), [torch.from_numpy(clip.frames[:1])], denoiser.new_state()
        first = codec.encode(pieces[0].permute(3, 0, 1, 2)[None].float().to(self.device) / 127.5 - 1)
        for chunk in range(int(cond.layout.chunk[-1]) + 1):
            at = (cond.layout.chunk == chunk).nonzero()[:, 0]
            part = cond.frames(int(at[0]), int(at[-1]) + 1)
            if arm != "frozen":
                part = dataclasses.replace(part, history=evidence(part, pieces[-1]))
            if arm == "LoRA, all tokens kept":
                part = dataclasses.replace(part, history=tuple(dataclasses.replace(b, keep=None) for b in part.history))
            given = first if chunk == 0 else None
            latents, state = next(stream(denoiser, state, part.to(self.device), torch.tensor([1.0, 0.0]), noise, given))
            video = decode(latents)[0].clamp(-1, 1)
            pieces.append(video.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).cpu())
        return torch.cat(pieces[1:]).numpy()

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


def measure(made: np.ndarray, clip: Clip, seen: np.ndarray) -> dict[str, float]:
    """METRICS of frames behind the first."""
    square = ((made[1:].astype(np.float64) - clip.frames[1:]) ** 2).mean(-1)

    def psnr(where: np.ndarray) -> float:
        return float(10 * np.log10(255**2 / square[where].mean())) if where.any() else float("nan")

    motion = score_motion(flow_rotation(made, clip.intrinsics), clip.c2w)
    return {"psnr_seen_db": psnr(seen[1:]), "psnr_unseen_db": psnr(~seen[1:])} | {k: motion[k] for k in METRICS[2:]}


def line(name: str, told: dict[str, Any]) -> str:
    text = f"{name} {told['value']:.2f}"
    if "difference" not in told:
        return text
    value, low, high = (told["difference"][k] for k in ("value", "low", "high"))
    return f"{text} ({value:+.2f}, {low:+.2f} to {high:+.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="write the one video here, and end")
    parser.add_argument("--walk", type=int, default=3, help="which walk of the training maps that is")
    parser.add_argument("--adapter", type=Path, help="a run of warp_adapter/tiny")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sheet", type=Path, help="a folder for what was made of the first clips, arm beside arm, mp4")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.write is not None:
        write_walk(args.write, args.walk)
        return
    arms, rows, start = Arms(args.adapter, args.device), [], time.time()
    for number, clip in enumerate(tracked(list(held_out(args.clips)), "clips")):
        seen = seen_from_first(clip)
        shown = {"true, through the codec": arms.ceiling(clip)}
        shown |= {arm: arms.make(arm, clip, derive_seed(1, "warp_adapter", number)) for arm in ARMS}
        row = {name: measure(made, clip, seen) for name, made in shown.items()}
        rows.append({"seen": float(seen[1:].mean())} | row)
        if args.sheet is not None and number < 4:
            args.sheet.mkdir(parents=True, exist_ok=True)
            pictures = np.concatenate([clip.frames, *shown.values()], axis=2)
            write_video(args.sheet / f"{number}.mp4", pictures, clip.fps)
    found: dict[str, Any] = {"clips": len(rows), "seen": float(np.mean([row["seen"] for row in rows])), "arms": {}}
    for name in ("true, through the codec", *ARMS):
        columns = {m: np.array([row[name][m] for row in rows]) for m in METRICS}
        told = found["arms"][name] = {m: mean_interval(x)._asdict() for m, x in columns.items()}
        if name not in ("true, through the codec", "frozen"):
            less = "frozen" if name == "zero-shot" else "zero-shot" if name == "LoRA" else "LoRA"
            told["against"] = less
            for m, x in columns.items():
                difference, p, _ = paired(x, np.array([row[less][m] for row in rows]))
                told[m] |= {"difference": difference._asdict(), "p": p}
        print(f"{name:24s} " + "  ".join(map(line, METRICS, map(told.get, METRICS))), flush=True)
    digest = checkpoints.weights_hash(checkpoints.resolve(args.adapter))
    about = {"base": arms.record["lora"]["sha256"], "adapter": digest, "device": args.device,
             "seconds": time.time() - start, "python": platform.python_version()}  # fmt: skip
    found |= about | {"versions": {p: version(p) for p in ("torch", "diffusers", "vizdoom")}}
    if args.out:
        write_json(args.out, found | {"rows": rows})


if __name__ == "__main__":
    main()
