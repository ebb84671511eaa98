"""A training step: seconds, share of the measured matmul peak, memory. Random weights and data.

    python -m benchmarks.speed.training_step --size 2b6 --frames 81 961                  # one GPU, 704x1280, bf16
    python -m benchmarks.speed.training_step --size 1b3 --frames 241 --attention flex    # packed, 480x832, one GPU
    python -m benchmarks.speed.training_step --size tiny --frames 81                     # CPU
    python -m benchmarks.speed.training_step --size causal_tiny --frames 41              # packed, CPU

A step is forward, backward, clipping and AdamW on one clip, blocks recomputed in the backward pass. The causal video
model's is teacher forcing: every frame twice, as clean context and as noisy target, under full history. Useful work is
3 times the forward pass' matrix products, convolutions and attention (recomputing and what a mask hides are not
counted); the peak is that of square bf16 products (fp32 on a CPU) measured in the same run. Writes JSON with device and
versions to --out.
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
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.streaming import SIZES, condition
from vgr.models.causal_video import CausalVideo


def synchronise(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_peak(device: str) -> float:
    """FLOP a second of the best of ten large square products."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = synchronise(device)
        a @ b
        best = min(best, synchronise(device) - start)
    return 2 * size**3 / best


def measure(args: argparse.Namespace, frames: int, peak: float) -> dict[str, Any]:
    size = SIZES[args.size]
    latents, packed = 1 + (frames - 1) // size.stride, size.model is CausalVideo
    with torch.device(args.device):
        torch.manual_seed(0)
        backend = {"attention_backend": args.attention} if packed else {"scan_backend": args.scan}
        model = size.model(**size.arguments, activation_checkpointing=True, **backend).train()
        x = torch.randn(1, model.in_channels, (1 + packed) * latents, *size.grid)
    cond, t = condition(size, latents, args.device), torch.full((1, latents), 0.5, device=args.device)
    if packed:
        cond, t = cond.packed(), torch.cat([0 * t, t], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    model.attention_backend = "torch"  # chunk by chunk nothing hidden is computed, so nothing hidden is counted
    with torch.no_grad(), autocast, FlopCounterMode(display=False) as counter:
        model(x, t, cond)
    model.attention_backend = args.attention
    if args.compile:
        for block in model.blocks:
            block.compile()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.repeats + 1):
        start = synchronise(args.device)
        with autocast:
            loss = model(x, t, cond)[0][:, :, -latents:].square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(synchronise(args.device) - start)
    step = statistics.median(seconds[1:])
    flops = 3 * counter.get_total_flops()
    tokens = x.shape[2] * size.grid[0] * size.grid[1] // (4 if packed else 1)  # patches of 2x2
    row = {
        "size": args.size, "raw_frames": frames, "latent_frames": latents, "tokens": tokens, **backend,
        "compiled": args.compile, "parameters": sum(p.numel() for p in model.parameters()), "step_s": step,
        "step_s_min_max": [min(seconds[1:]), max(seconds[1:])], "tflop": flops / 1e12, "mfu": flops / step / peak,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None,
    }  # fmt: skip
    print(json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--frames", type=int, nargs="+", default=[81])
    parser.add_argument("--scan", default="torch", choices=("torch", "triton"))
    parser.add_argument("--attention", default="torch", choices=("torch", "flex"), help="of the causal video model")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    peak = matmul_peak(args.device)
    rows = [measure(args, frames, peak) for frames in args.frames]
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": metadata.version("torch"), "python": platform.python_version()}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        found = {"device": device, "versions": versions, "matmul_peak_tflops": peak / 1e12, "rows": rows}
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
