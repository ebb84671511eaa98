"""Streaming a world model chunk by chunk: latency, time and memory of every chunk. Random weights, four steps a chunk.

    python -m benchmarks.speed.streaming --size 2b6 --seconds 60              # one GPU, 704x1280, bf16
    python -m benchmarks.speed.streaming --size tiny --seconds 120            # two CPU cores

A chunk is four denoising calls and the clean pass that commits it. Writes JSON with device and versions to --out; the
memory is what stands allocated after a chunk (GPU: peak while it was made). --decode adds an LTX-2 VAE folder's time.
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
from typing import Any

import torch

from vgr.diffusion.rollout import stream
from vgr.diffusion.samplers import frame_noise
from vgr.diffusion.timesteps import few_step_sigmas
from vgr.geometry.cameras import group_by_latent
from vgr.geometry.trajectories import named_cameras
from vgr.models.world_model import WorldModel
from vgr.types import Cameras, Conditioning, Layout, TextStates

# Constructor arguments, latent grid, text tokens.
SIZES: dict[str, tuple[dict[str, Any], tuple[int, int], int]] = {
    "tiny": (
        {"in_channels": 46, "width": 128, "heads": 4, "layers": 4, "mlp_ratio": 2.0, "text_width": 64}, (6, 8), 64,
    ),
    "2b6": ({"softmax_bf16": True}, (22, 40), 300),
}  # fmt: skip
FPS, CHUNK = 16, 3


def build(size: str, device: str) -> WorldModel:
    arguments, *_ = SIZES[size]
    with torch.device(device):
        torch.manual_seed(0)
        model = WorldModel(**arguments, sink=1, window=1).eval()
        torch.nn.init.normal_(model.final_linear.weight, std=0.02)
    return model


def condition(size: str, frames: int, device: str) -> Conditioning:
    """An orbit over all frames, and random text states."""
    arguments, _, tokens = SIZES[size]
    c2w, intrinsics = named_cameras("orbit", 1 + (frames - 1) * 8, FPS)
    cameras = group_by_latent(Cameras(c2w[None].float(), intrinsics[None].float()), 8)
    states = torch.randn(1, 1, tokens, arguments.get("text_width", 2304))
    text = TextStates(states, torch.ones(1, 1, tokens, dtype=torch.bool))
    return Conditioning(Layout.chunked(1, frames, CHUNK), text, cameras).to(device)


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
    chunks = round(args.seconds * FPS / (8 * CHUNK))
    frames = 1 + CHUNK * chunks
    model, cond = build(args.size, args.device), condition(args.size, frames, args.device)
    if args.compile:
        for block in model.blocks:
            block.compile()
    codec = None
    if args.decode:
        from vgr.models.ltx2_vae import LTX2Codec

        codec = LTX2Codec.from_pretrained(args.decode, device=args.device, dtype="bfloat16")
    noise = frame_noise([0], (model.in_channels, *SIZES[args.size][1]), args.device)
    sigmas = few_step_sigmas(4, 8.0).to(args.device)
    rows: list[dict[str, float]] = []
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        for part in (cond.frames(0, 1 + 3 * CHUNK), cond):  # a warm-up over three chunks, then all
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
    return summary(args, frames, rows)


def summary(args: argparse.Namespace, frames: int, rows: list[dict[str, float]]) -> dict[str, Any]:
    dit = [row["dit_s"] for row in rows]
    later = dit[1:]  # the first chunk is a frame longer
    first, last = statistics.median(later[:10]), statistics.median(later[-10:])
    found = {
        "size": args.size, "seconds": (1 + (frames - 1) * 8) / FPS, "chunks": len(rows), "compiled": args.compile,
        "first_chunk_s": dit[0], "chunk_p50_s": statistics.median(later),
        "chunk_p95_s": sorted(later)[int(0.95 * (len(later) - 1))], "dit_total_s": sum(dit),
        "decode_total_s": sum(row["decode_s"] for row in rows), "last_ten_over_first_ten": last / first,
        "gib_after_three_chunks": rows[2]["gib"], "gib_at_the_end": rows[-1]["gib"],
        "gib_peak": max(row["gib"] for row in rows),
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
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--decode", type=Path, help="folder of an LTX-2 VAE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = measure(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
