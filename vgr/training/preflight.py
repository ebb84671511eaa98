"""What is checked before the first step, on every rank: the GPU, the run folder, its disk, a collective."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vgr.parallel.fsdp import whole_shape

OTHERS_GIB = 4.0  # what a GPU may hold beside our tensors: the driver's context, buffers of collectives
PATIENCE_S = 30.0  # for a file of the first rank to be seen by all: network file systems remember what was not there


def check(run_dir: Path, device: torch.device, checkpoints: Path, saves: int, weights: Mapping[str, Tensor]) -> None:
    """Every rank tells what is wrong where it runs; then all of them end if anything is.

    run_dir: the run's folder, which holds config.yaml by now; saves: how many checkpoints of these weights, with their
    average and two moments, the folder `checkpoints` must be able to hold, those that are there included.
    Raises OSError on the first rank, with a line for every rank and host, and SystemExit(2) on the others.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own: dict[str, Any] = {"host": socket.gethostname(), "torch": torch.__version__, "gpu": None, "wrong": []}
    needed = 4 * sum(whole_shape(x).numel() * x.element_size() for x in weights.values())
    own["wrong"] += _folder(run_dir, needed * max(1, saves - len(list(checkpoints.glob("step_*")))))
    if device.type == "cuda":
        own["gpu"] = str(torch.cuda.get_device_properties(device).uuid)
        own["wrong"] += _gpu(device)
    found = [own]
    if ranks > 1:
        summed = torch.full((), rank + 1.0, device=device)
        dist.all_reduce(summed)
        if summed.item() != (expected := ranks * (ranks + 1) / 2):
            own["wrong"].append(f"a sum over ranks gave {summed.item():g} instead of {expected:g}")
        found = [own] * ranks
        dist.all_gather_object(found, own)
    told = complaints(found)
    if told and rank > 0:
        raise SystemExit(2)
    if told:
        raise OSError("; ".join(told))


def complaints(found: list[dict[str, Any]]) -> list[str]:
    """One line for each thing that is wrong, by rank and host; found: what the ranks told, in their order."""
    told = [f"rank {rank} on {x['host']}: {line}" for rank, x in enumerate(found) for line in x["wrong"]]
    for rank, x in enumerate(found):
        first = next(r for r, y in enumerate(found) if y["gpu"] == x["gpu"])
        if x["gpu"] is not None and first < rank:
            told.append(f"rank {rank} on {x['host']} has the GPU of rank {first}: one task a GPU, all of them visible")
        if x["torch"] != found[0]["torch"]:
            told.append(f"rank {rank} on {x['host']} runs torch {x['torch']}, rank 0 {found[0]['torch']}")
    return told


def _folder(run_dir: Path, needed: int) -> list[str]:
    end = time.monotonic() + PATIENCE_S
    while not (run_dir / "config.yaml").is_file():
        if time.monotonic() > end:
            return [f"{run_dir} is not the first rank's: runs= must lie on a file system that all nodes share"]
        time.sleep(0.1)
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        return [f"{free / 2**30:.1f} GiB free for {run_dir}, checkpoints may take {needed / 2**30:.1f}: make room"]
    return []


def _gpu(device: torch.device) -> list[str]:
    free, total = torch.cuda.mem_get_info(device)
    others = (total - free - torch.cuda.memory_reserved(device)) / 2**30
    wrong = [f"{device} holds {others:.1f} GiB of other processes"] if others > OTHERS_GIB else []
    x = torch.arange(1024.0, device=device).remainder(7).expand(1024, 1024)  # small integers: exact in any precision
    if not torch.equal(x @ x.T, torch.full_like(x, x[0].square().sum().item())):
        wrong.append(f"{device} multiplies wrongly")
    return wrong
