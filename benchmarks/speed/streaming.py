"""Streaming a model chunk by chunk: latency, time and memory of every chunk. Random weights, four steps a chunk.

    python -m benchmarks.speed.streaming --size 2b6 --seconds 60                        # world model, 704x1280, one GPU
    python -m benchmarks.speed.streaming --size 1b3 --memory routed --seconds 120       # causal video, 480x832, one GPU
    python -m benchmarks.speed.streaming --size tiny --seconds 120 --repeats 9          # world model, two CPU cores
    python -m benchmarks.speed.streaming --size causal_tiny --memory full --recompute   # causal video, two CPU cores

A chunk is four denoising calls and the clean pass that commits it. Writes JSON with device and versions to --out; the
memory is what stands allocated after a chunk (GPU: peak while it was made). --decode adds a VAE folder's time (LTX-2's
or Wan's). --repeats: rollouts in turn; a chunk's time is the median of them, and the last ten chunks over the first ten
have a spread, for a machine's noise is larger than a few percent of a second. --memory: what the causal video model
remembers. --recompute: beside it, what a chunk's denoising call costs without a memory, as one masked call over all
frames so far.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import resource
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import frame_noise
from vgr.diffusion.timesteps import few_step_sigmas
from vgr.geometry.cameras import group_by_latent
from vgr.geometry.trajectories import named_cameras
from vgr.models.causal_video import CausalVideo
from vgr.models.world_model import WorldModel
from vgr.nn.memory import PLACES
from vgr.types import Cameras, Conditioning, Layout, TextStates


class Size(NamedTuple):
    """model class and arguments, latent grid, text tokens, frames a second, and the codec's temporal stride."""

    model: type[WorldModel] | type[CausalVideo]
    arguments: dict[str, Any]
    grid: tuple[int, int]
    tokens: int
    fps: int
    stride: int


_TINY = {"in_channels": 46, "width": 128, "heads": 4, "layers": 4, "mlp_ratio": 2.0, "text_width": 64}
_CAUSAL_TINY = {"in_channels": 40, "width": 96, "heads": 4, "layers": 4, "ffn_width": 256, "text_width": 64}
_14B = {"width": 5120, "heads": 40, "layers": 40, "ffn_width": 13824}
SIZES = {
    "tiny": Size(WorldModel, _TINY, (6, 8), 64, 16, 8),
    "2b6": Size(WorldModel, {"softmax_bf16": True}, (22, 40), 300, 16, 8),
    "causal_tiny": Size(CausalVideo, _CAUSAL_TINY, (8, 8), 64, 8, 2),
    "1b3": Size(CausalVideo, {}, (60, 104), 512, 16, 4),
    "14b": Size(CausalVideo, _14B, (60, 104), 512, 16, 4),
}
MEMORY: dict[str, dict[str, int]] = {
    "full": {}, "window": {"window": 3}, "sink": {"window": 3, "sink": 3}, "routed": {"window": 3, "routed": 5},
}  # fmt: skip
CHUNK = 3


def build(args: argparse.Namespace) -> WorldModel | CausalVideo:
    size = SIZES[args.size]
    memory: dict[str, Any] = {"sink": 1, "window": 1}
    if size.model is CausalVideo:
        memory = {**MEMORY[args.memory], "place": args.place}
    with torch.device(args.device):
        torch.manual_seed(0)
        dtype = torch.bfloat16 if args.device == "cuda" and size.model is CausalVideo else torch.float32
        model = size.model(**size.arguments, **memory).to(dtype).eval()
        torch.nn.init.normal_(model.final_linear.weight if size.model is WorldModel else model.final.weight, std=0.02)
    return model


def condition(size: Size, frames: int, device: str) -> Conditioning:
    """Random text states and, for a model with cameras, an orbit over all frames."""
    width = size.arguments.get("text_width", 2304 if size.model is WorldModel else 4096)
    states = torch.randn(1, 1, size.tokens, width)
    text = TextStates(states, torch.ones(1, 1, size.tokens, dtype=torch.bool))
    cameras = None
    if size.model is WorldModel:
        c2w, intrinsics = named_cameras("orbit", 1 + (frames - 1) * 8, size.fps)
        cameras = group_by_latent(Cameras(c2w[None].float(), intrinsics[None].float()), 8)
    return Conditioning(Layout.chunked(1, frames, CHUNK), text, cameras).to(device)


def recomputed(model: CausalVideo, cond: Conditioning, size: Size, device: str) -> list[dict[str, float]]:
    """Seconds of one masked call over all frames up to a chunk, at every eighth of the video."""
    rows, frames = [], len(cond.layout.position)
    for end in range(1 + CHUNK * max(1, frames // CHUNK // 8), frames + 1, CHUNK * max(1, frames // CHUNK // 8)):
        x, t = torch.randn(1, model.in_channels, end, *size.grid, device=device), torch.ones(1, end, device=device)
        times = []
        for _ in range(3):
            mark = time.perf_counter()
            model(x, t, cond.frames(0, end))[0].sum().item()
            times.append(time.perf_counter() - mark)
        rows.append({"frames": end, "call_s": min(times)})
    return rows


def allocated(device: str) -> float:
    """GiB: the GPU's peak since the last call, else this process' tensors and everything beside."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return pages * resource.getpagesize() / 2**30


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    size = SIZES[args.size]
    chunks = round(args.seconds * size.fps / (size.stride * CHUNK))
    frames = 1 + CHUNK * chunks
    model, cond = build(args), condition(size, frames, args.device)
    if size.model is CausalVideo:
        grid = (size.grid[0] // 2, size.grid[1] // 2)
        plan = model.memory_plan(frames, grid, CHUNK, 2 if args.device == "cuda" else 4)
        print("GB:", ", ".join(f"{k} {v:.3g}" for k, v in plan.items()))
    if args.compile:
        for block in model.blocks:
            block.compile()
    codec = None
    if args.decode:
        from vgr.models.ltx2_vae import LTX2Codec
        from vgr.models.wan_vae import WanCodec

        kind = LTX2Codec if size.model is WorldModel else WanCodec
        codec = kind(args.decode, device=args.device, dtype="bfloat16")
    noise = frame_noise([0], (model.in_channels, *size.grid), args.device)
    sigmas = few_step_sigmas(4, 8.0).to(args.device)
    rollouts: list[list[dict[str, float]]] = []
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        for part in (cond.frames(0, 1 + 3 * CHUNK), *[cond] * args.repeats):  # a warm-up over three chunks, then all
            rows, decode = [], codec.stream() if codec else None
            allocated(args.device)
            mark = time.perf_counter()
            for latents, _ in stream(model, model.new_state(), part, sigmas, noise):
                if args.device == "cuda":
                    torch.cuda.synchronize()
                made = time.perf_counter()
                if decode is not None:
                    decode(latents).sum().item()
                rows.append(
                    {"dit_s": made - mark, "decode_s": time.perf_counter() - made, "gib": allocated(args.device)}
                )
                mark = time.perf_counter()
            rollouts.append(rows)
        extra = {"recomputed": recomputed(model, cond, size, args.device)} if args.recompute else {}
    return {**summary(args, size, frames, rollouts[1:]), **extra}


def growth(dit: list[float]) -> float:
    """The last ten chunks' time over the first ten's; the very first is a frame longer and left out."""
    return statistics.median(dit[-10:]) / statistics.median(dit[1:11])


def summary(
    args: argparse.Namespace, size: Size, frames: int, rollouts: list[list[dict[str, float]]]
) -> dict[str, Any]:
    rows = [{k: statistics.median(row[k] for row in same) for k in same[0]} for same in zip(*rollouts)]
    dit = [row["dit_s"] for row in rows]
    later, grown = dit[1:], sorted(growth([row["dit_s"] for row in one]) for one in rollouts)
    found = {
        "size": args.size, "memory": args.memory if size.model is CausalVideo else None,
        "place": args.place if size.model is CausalVideo else None,
        "seconds": (1 + (frames - 1) * size.stride) / size.fps, "chunks": len(rows), "compiled": args.compile,
        "first_chunk_s": dit[0], "chunk_p50_s": statistics.median(later),
        "chunk_p95_s": sorted(later)[int(0.95 * (len(later) - 1))], "dit_total_s": sum(dit),
        "decode_total_s": sum(row["decode_s"] for row in rows), "last_ten_over_first_ten": growth(dit),
        "last_ten_over_first_ten_by_rollout": grown, "gib_after_three_chunks": rollouts[0][2]["gib"],
        "gib_at_the_end": rollouts[-1][-1]["gib"], "gib_peak": max(row["gib"] for one in rollouts for row in one),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": metadata.version("torch"), "python": platform.python_version()}
    return {"device": device, "versions": versions, **found, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory", default="routed", choices=list(MEMORY))
    parser.add_argument("--place", default="device", choices=PLACES, help="of what has left the window")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--decode", type=Path, help="folder of an LTX-2 or Wan VAE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
