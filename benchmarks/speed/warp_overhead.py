"""What a warp adapter costs a chunk, in time and memory: without evidence, with it zero-shot, and with a LoRA as well.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.warp_overhead --out benchmarks/results/speed_warp_overhead_cpu.json
    python -m benchmarks.speed.warp_overhead --size full --depth network --out benchmarks/results/warp_overhead.json

The third chunk of a rollout through a procedural room along a 15 degree orbit, by the Helios of `warp_adapter/tiny` or,
with --size full, of `warp_adapter/one_video` (14 B, 384x640, Wan's VAE), all weights random: they change no time. The
arms run once to warm up, then in turn `--repeats` times; ratios are of adjacent pairs, arm / without evidence. Stages:
depth of the frames that are looked back on, warp (what moves, keyframes, rendering, selection, noise), encode (the
warp's latents), denoise (all stages and steps); decoding is the same in all arms and left out, and so is text. --depth:
known, the room's own at no cost, or network, a Depth Anything of Small's size that runs with random weights, its answer
being the room's depth all the same, so that as many tokens are kept as in a scene. Memory: of a GPU the peak while the
arm ran, of a CPU the process' resident peak while it ran, where the system tells it; besides, tokens of a call in the
first stage and the bytes of evidence.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from benchmarks.speed.warp import Room
from vgr import command
from vgr.data.annotators import DepthModel
from vgr.data.files import write_json
from vgr.diffusion.pyramid import SIZES, Past, Streamed
from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import frame_noise
from vgr.geometry.cameras import relative_to_first
from vgr.geometry.warp import median_depth
from vgr.models.helios import Helios
from vgr.models.wan_vae import WanCodec
from vgr.models.warp_adapter import WarpEvidence, without_adapters
from vgr.nn import lora
from vgr.types import Cameras, Codec, Conditioning, HistoryBlock, Layout, TextStates, raw_frames

PRESETS = {"tiny": "warp_adapter/tiny", "full": "warp_adapter/one_video"}
ARMS = ("without evidence", "zero-shot", "LoRA")
STAGES = ("depth_s", "warp_s", "encode_s", "denoise_s")
CHUNK, LOOK_BACK = 2, 9  # the chunk that is measured, and how many frames before one are looked at


class Clock:
    """Seconds spent in functions, on this device."""

    def __init__(self, device: str) -> None:
        self.device, self.spent = device, 0.0

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:  # noqa: ANN401
            start = self.now()
            made = call(*args)
            self.spent += self.now() - start
            return made

        return timed


def peak_gib(device: str, reset: bool = False) -> float | None:
    """Peak since the last reset: allocated on the GPU, or resident of this process; None where nobody tells."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        told = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(told.split("VmHWM:")[1].split()[0]) / 2**20


def random_vae(device: str) -> WanCodec:
    """Wan's VAE at its released size, with random weights, in clips of nine latent frames."""
    from diffusers import AutoencoderKLWan

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoencoderKLWan().save_pretrained(folder)
        return WanCodec(folder, device=device, clip=9)


def random_depth() -> Callable[[np.ndarray], np.ndarray]:
    """Depth Anything at Small's size and input, 518 pixels, with random weights."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, DPTImageProcessor

    folder = Path(tempfile.mkdtemp())
    DepthAnythingForDepthEstimation(DepthAnythingConfig(depth_estimation_type="metric")).save_pretrained(folder)
    size = {"height": 518, "width": 518}
    DPTImageProcessor(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return DepthModel(folder)


class Walk:
    """An orbit through a room: cameras (1,F) of all frames, and picture and depth of any, made when asked for."""

    def __init__(self, size_hw: tuple[int, int], frames: int) -> None:
        self.room, self.made = Room(0, size_hw), {}
        at = median_depth(torch.from_numpy(self.room.depth))
        self.c2w = self.room.path("orbit", frames, distance=at, angle_deg=15)
        k = torch.from_numpy(self.room.k).float().expand(1, frames, 4)
        self.cameras = Cameras(relative_to_first(torch.from_numpy(self.c2w)[None]).float(), k)

    def __call__(self, frame: int) -> tuple[Tensor, Tensor]:
        if frame not in self.made:
            args = self.c2w[frame], self.room.k, 0.0, self.room.size_hw
            both = self.room.scene.render(*args), self.room.scene.depth(*args)
            self.made[frame] = tuple(map(torch.from_numpy, both))
        return self.made[frame]


class Rollout:
    """A random Helios with adapters at its third chunk, and the evidence that it would be shown."""

    def __init__(self, cfg: DictConfig, device: str, depth: str) -> None:
        self.device, self.chunk, self.cfg = device, cfg.training.chunk, cfg
        codec: Codec = random_vae(device) if cfg.codec._target_.endswith("WanCodec") else instantiate(cfg.codec)
        torch.manual_seed(0)
        with torch.device(device):
            self.model: Helios = instantiate(cfg.model).eval()
            lora.add(self.model, cfg.lora.rank, cfg.lora.alpha, cfg.lora.targets)
        self.model.to(device)
        for p in self.model.parameters():
            if not p.any():  # a new model's last layer and adapters are zero
                torch.nn.init.normal_(p, std=0.02)
        self.encode, self.look = Clock(device), Clock(device)
        self.codec = copy.copy(codec)
        self.codec.encode = self.encode.around(codec.encode)
        clips = codec.clip is not None
        count = self.chunk * (CHUNK + 1) + (not clips)
        self.layout = Layout.chunked(1, count, self.chunk, clips=clips)
        self.walk = Walk(tuple(cfg.data.source.size_hw), raw_frames(count, codec.stride[0], codec.clip))
        network = random_depth() if depth == "network" else None

        def depth_of(image: Tensor, frame: int) -> Tensor:
            if network is not None:
                network(image[None].numpy())
            return self.walk(frame)[1]

        select = {"threshold": cfg.training.threshold, "rule": cfg.training.rule}
        self.evidence = WarpEvidence(self.walk.cameras, self.look.around(depth_of), self.codec, seed=1, **select)
        self.begun = [self.shown(chunk) for chunk in range(CHUNK)]
        self.kept = list(self.evidence._kept)
        self.tokens: list[int] = []
        self.model.transformer.blocks[1].register_forward_pre_hook(lambda _, args: self.tokens.append(args[0].shape[1]))

    def part(self, chunk: int) -> Conditioning:
        at = (self.layout.chunk == chunk).nonzero()[:, 0]
        text = torch.randn(1, 1, 32, self.cfg.model.text_width, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(1, 1, 32, dtype=torch.bool)
        cond = Conditioning(self.layout.frames(int(at[0]), int(at[-1]) + 1), TextStates(text, mask))
        return cond.to(self.device)

    def shown(self, chunk: int) -> tuple[HistoryBlock, ...]:
        """The evidence of a chunk, behind frames that are true."""
        cond = self.part(chunk)
        first = raw_frames(int(cond.layout.position[0]), self.codec.stride[0], self.codec.clip)
        numbers = range(max(first - LOOK_BACK, 0), max(first, 1))
        return self.evidence(cond, torch.stack([self.walk(n)[0] for n in numbers]))

    @torch.no_grad()
    def run(self, arm: str) -> dict[str, float]:
        """Seconds of each stage of the measured chunk, its peak, tokens of a call of the first stage, and evidence."""
        self.evidence._kept = list(self.kept)
        cond, base = self.part(CHUNK), without_adapters(self.model)
        height, width = (n // s for n, s in zip(self.cfg.data.source.size_hw, self.codec.stride[1:]))
        shape = (self.codec.channels, height, width)
        noise, first = frame_noise([1], shape, self.device), int(cond.layout.position[0])
        past = torch.randn(1, shape[0], min(sum(SIZES), first), height, width, device=self.device)
        staged = {k: v for k, v in (self.cfg.sampling.get("staged") or {}).items() if k != "image_noise"}
        steps = (self.cfg.sampling.steps,) * self.model.stages
        coarse = self.model if arm == "LoRA" else base
        denoiser = Streamed(base, noise, steps, coarse=coarse, **staged)
        peak_gib(self.device, reset=True)
        self.encode.spent = self.look.spent = 0.0
        self.tokens.clear()
        start = self.encode.now()
        history = () if arm == ARMS[0] else self.shown(CHUNK)
        shown = self.encode.now()
        cond = Conditioning(cond.layout, cond.text, history=history).to(self.device)
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")
        with autocast:
            next(stream(denoiser, Past(past, past[:, :, :1], first), cond, torch.tensor([1.0, 0.0]), noise))
        ended, (look, encode) = self.encode.now(), (self.look.spent, self.encode.spent)
        warped = shown - start - look - encode if history else 0.0
        found = {"depth_s": look, "warp_s": warped, "encode_s": encode, "denoise_s": ended - shown}
        kept = [block.keep for block in history if block.keep is not None]
        return found | {
            "total_s": ended - start, "peak_gib": peak_gib(self.device), "tokens": self.tokens[0],
            "evidence_bytes": sum(block.latents.nbytes for block in history),
            "kept": float(torch.cat([x.flatten() for x in kept]).float().mean()) if kept else None,
        }  # fmt: skip


def measure(cfg: DictConfig, device: str, depth: str, repeats: int) -> list[dict[str, Any]]:
    """A row an arm: medians, and the ratio of its whole time to that without evidence in adjacent pairs."""
    rollout = Rollout(cfg, device, depth)
    turns = [{arm: rollout.run(arm) for arm in ARMS} for _ in range(1 + repeats)][1:]
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"arm": arm, "pairs": repeats}
        for key, value in turns[0][arm].items():
            row[key] = None if value is None else median(turn[arm][key] for turn in turns)
        for name, key in (("ratio", "total_s"), ("denoise_ratio", "denoise_s")):
            ratios = sorted(turn[arm][key] / turn[ARMS[0]][key] for turn in turns)
            row |= {f"{name}_median": median(ratios), f"{name}_min": ratios[0], f"{name}_max": ratios[-1]}
        told = "  ".join(f"{stage[:-2]} {row[stage]:.3f}" for stage in STAGES)
        peak = "" if row["peak_gib"] is None else f"  peak {row['peak_gib']:.3f} GiB"
        print(f"{arm:17s} {row['total_s']:.3f} s ({told})  ratio {row['ratio_median']:.2f} ({row['ratio_min']:.2f} to "
              f"{row['ratio_max']:.2f})  {row['tokens']} tokens{peak}", flush=True)  # fmt: skip
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="tiny", choices=list(PRESETS))
    parser.add_argument("--depth", default="known", choices=("known", "network"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    load = os.getloadavg()
    cfg = command.compose("train", [f"experiments={PRESETS[args.size]}"])
    rows = measure(cfg, args.device, args.depth, args.repeats)
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else cpu, "load": load, "size": args.size,
        "depth": args.depth, "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "diffusers")}, "rows": rows,
    }  # fmt: skip
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
