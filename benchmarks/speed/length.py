"""What a call of the world model costs over the length of its clip, by what mixes its tokens (study `attention`).

    python -m benchmarks.speed.length                                                  # the tiny arms, CPU
    python -m benchmarks.speed.length --device cuda --size full --lengths 11 31 61 121  # 704x1280: 5 s to a minute

One call is all frames at once, batch 1, one time for all but the clean first frame, random weights, no gradient; on a
GPU in bf16 with the Triton scan. For each length the mixers are called in turn, once to warm up, then --repeats times:
median milliseconds with least and most. MiB are the call's own tensors at their most, on a CPU counted as they are made
(what a fused product holds inside is not seen), on a GPU the allocator's. --out: JSON with device and versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from vgr import command, studies
from vgr.geometry.cameras import group_by_latent
from vgr.geometry.trajectories import named_cameras
from vgr.training import step_cost
from vgr.types import Cameras, Conditioning, Layout, TextStates

GRIDS = {"tiny": (6, 8), "full": (22, 40)}
LENGTHS = (5, 15, 29, 57, 113)


def models(size: str, device: str) -> dict[str, nn.Module]:
    """The arms' models by name, each with weights of its own."""
    study, made = studies.read("attention"), {}
    for arm, preset in zip(study.arms, study.presets(size == "tiny")):
        told = command.compose("train", [f"experiments={preset}"]).model
        with torch.device(device):
            made[arm.name] = instantiate(told, scan_backend="triton" if device == "cuda" else "torch").eval()
    return made


def inputs(model: Any, frames: int, grid: tuple[int, int], device: str) -> tuple[Any, ...]:
    """Latents (1,C,T,H,W), times (1,T), an orbit and random text."""
    raw = model.raw_frames
    c2w, intrinsics = named_cameras("orbit", 1 + (frames - 1) * raw, 16)
    cameras = group_by_latent(Cameras(c2w[None].float(), intrinsics[None].float()), raw)
    text = TextStates(torch.randn(1, 1, 64, model.config["text_width"]), torch.ones(1, 1, 64, dtype=torch.bool))
    t = torch.full((1, frames), 0.5)
    t[:, 0] = 0.0
    cond = Conditioning(Layout.whole(1, frames), text, cameras).to(device)
    return torch.randn(1, model.in_channels, frames, *grid, device=device), t.to(device), cond


@torch.no_grad()
def call(model: nn.Module, told: tuple[Any, ...], device: str) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        model(*told)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def peak_mib(model: nn.Module, told: tuple[Any, ...], device: str) -> float:
    """MiB of what one call allocates, at its most; the call also warms up."""
    if device == "cpu":
        with step_cost._Tally() as tally:
            call(model, told, device)
        return tally.peak[False] / 2**20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(model, told, device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(size: str, lengths: list[int], repeats: int, device: str) -> list[dict[str, Any]]:
    """A row for each length and mixer."""
    rows, made = [], models(size, device)
    for frames in lengths:
        told = {name: inputs(model, frames, GRIDS[size], device) for name, model in made.items()}
        mib = {name: peak_mib(model, told[name], device) for name, model in made.items()}
        turns = [{name: call(model, told[name], device) for name, model in made.items()} for _ in range(repeats)]
        for name in made:
            ms = [turn[name] for turn in turns]
            row = {"mixer": name, "latent_frames": frames, "ms": statistics.median(ms), "ms_min": min(ms),
                   "ms_max": max(ms), "mib": mib[name]}  # fmt: skip
            print(f"{name:10s} T={frames:4d} {row['ms']:9.1f} ms ({min(ms):.1f} to {max(ms):.1f}) {mib[name]:9.1f} MiB")
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", default="tiny", choices=list(GRIDS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="latent frames")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = measure(args.size, args.lengths, args.repeats, args.device)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": metadata.version("torch"), "python": platform.python_version()}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"device": device, "versions": versions, "size": args.size, "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
