"""Planned memory beside measured: training steps of real modules at sizes between the demo's and a GPU's.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.plan_memory --out benchmarks/results/plan_memory_cpu.json
    python -m benchmarks.speed.plan_memory --device cuda --out benchmarks/results/plan_memory.json

A case is a preset with other sizes and random weights, trained for two steps (forward, backward, clipping, AdamW,
average) in a process of its own, with all kept for the backward pass and with blocks recomputed. Measured is the most
memory above what stood before the module was built: on a CPU of the process (large blocks go back to the system at
once, by glibc's MALLOC_MMAP_THRESHOLD_), on a GPU of torch's allocator. Planned is `vgr.planner`'s peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vgr import command, planner
from vgr.training import optim
from vgr.training.step_cost import step_costs

_CAUSAL = ["experiments=causal_video/multi_shot", "size=story_tiny", "init_from=null", "data.frames=61"]
# Name: overrides of conf/train, pixels. The first three are a CPU's, all are a GPU's.
CASES: dict[str, tuple[list[str], tuple[int, int]]] = {
    "world model": (
        ["experiments=world_model/doom_small", "model.width=256", "data.frames=25", "data.micro_batch=1"],
        (96, 128),
    ),
    "causal video model": ([*_CAUSAL, "model.width=256", "model.layers=6", "data.micro_batch=2"], (128, 128)),
    "Helios under LoRA": (
        ["experiments=warp_adapter/tiny", "model.heads=8", "model.layers=8", "data.frames=49", "data.micro_batch=2",
         "training.global_batch=2"],
        (192, 256),
    ),
    "world model, 2.6 B": (
        ["experiments=world_model/hybrid", "text=bytes", "text.width=2304", "data.frames=41"], (704, 1280),
    ),
    "causal video model, 1.3 B": (
        ["experiments=causal_video/multi_shot", "text=bytes", "text.width=4096", "data.frames=49"], (480, 832),
    ),
}  # fmt: skip
ON_CPU = 3


def resident(key: str) -> float:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since `/proc/self/clear_refs` was written."""
    return int(re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024.0


def measure(name: str, device: str, recompute: bool) -> dict[str, Any]:
    overrides, size_hw = CASES[name]
    cfg = command.compose("train", [*overrides, f"model.activation_checkpointing={recompute}"])
    batch, bf16 = planner.batch_of(cfg, size_hw), device == "cuda"
    shadow = planner.module_of(cfg)
    cost = step_costs(shadow, batch, bf16=bf16)[recompute]
    planned = planner.peak(planner.held(shadow, planner.Layout()), cost, planner.Layout(), at_once=False)
    del shadow
    torch.randn(64, 64, device=device, requires_grad=True).matmul(torch.randn(64, 64, device=device)).sum().backward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    module, batch = planner.module_of(cfg, device).to(device).train(), batch.to(device)
    steps(module, batch, bf16, device)
    measured = (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) - before
    return {
        "case": name, "blocks": "recomputed" if recompute else "kept",
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "latents": list(batch.latents.shape), "planned_gb": planned / 1e9, "measured_gb": measured / 1e9,
        "planned_to_measured": planned / measured,
    }  # fmt: skip


def steps(module: Any, batch: Any, bf16: bool, device: str) -> None:
    """Two, as `WorldModelTraining` takes them under Lightning."""
    optimizer = module.configure_optimizers()
    trained = [p for p in module.parameters() if p.requires_grad]
    current = [*module.model.parameters(), *module.text.parameters()]
    pairs = [(a, p) for a, p in zip(module.ema.parameters(), current, strict=True) if p.requires_grad]
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = module.training_step(batch, 0)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        optim.ema_update(*zip(*pairs), 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="default: all that the device can hold")
    parser.add_argument("--one", choices=("kept", "recomputed"), help="the first case alone, in this process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.cases[0], args.device, args.one == "recomputed")))
        return
    rows = []
    for name in args.cases or list(CASES)[: None if args.device == "cuda" else ON_CPU]:
        for blocks in ("kept", "recomputed"):
            asked = [sys.executable, "-m", __spec__.name, "--device", args.device, "--cases", name, "--one", blocks]
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            found = subprocess.run(asked, env=environment, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(found.splitlines()[-1]))
            print(json.dumps(rows[-1]), flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": metadata.version("torch"), "python": platform.python_version()}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"device": device, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
