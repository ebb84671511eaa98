"""What a causal video model's weights and memory take, in numbers and before anything is read (causal video, 4.4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vgr.data.shards import Shards
from vgr.models.causal_video import PATCH, CausalVideo
from vgr.nn.memory import MemoryPolicy
from vgr.training import checkpoints


def with_memory(record: dict[str, Any], memory: Mapping[str, Any] | None) -> dict[str, Any]:
    """generator.json with the memory of its causal video model changed. ValueError for what that does not have."""
    if not memory:
        return record
    known = MemoryPolicy.__dataclass_fields__
    kind, config = record["model"]["class"], record["model"]["config"]
    if kind != "CausalVideo" or memory.keys() - known.keys():
        raise ValueError(f"memory={dict(memory)}: this is a {kind}, and a CausalVideo takes {', '.join(known)}")
    return {**record, "model": {"class": kind, "config": {**config, **memory}}}


def parameters(config: Mapping[str, Any]) -> int:
    """Numbers in a causal video model's weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in CausalVideo(**config).parameters())


def fit(
    config: Mapping[str, Any], latents: tuple[int, int, int], chunk: int, device: str, *, weights: float, copies: int,
    bytes_per_number: int, key: str,
) -> str:  # fmt: skip
    """One line saying what a rollout of latents (T,H,W) takes; ValueError where the device has less.

    weights: GB of them; copies: memories alive at once, samples and both branches of guidance; key: what the settings
    of the memory are called (`model.` or `memory.`). Activations come on top.
    """
    frames, height, width = latents
    with torch.device("meta"):
        model = CausalVideo(**config)
    plan = model.memory_plan(frames, (height // PATCH, width // PATCH), chunk, bytes_per_number)
    plan = {k: v if k.startswith("again_") else v * copies for k, v in plan.items()}
    memory = plan["read"] + plan["history"] - plan["host"] + plan["means"] + plan.get("again", 0.0)
    told = f"weights {weights:.3g} GB, memory of {frames} latent frames {memory:.3g} GB on {device} (a chunk reads "
    told += f"{plan['read']:.3g}, kept {plan['history'] - plan['host']:.3g}), {plan['host']:.3g} GB in host memory"
    if "again" in plan:
        told += f", {plan['again_chunks']:.0f} commits made again to read at the end, {plan['again_pflop']:.3g} PFLOP"
    wanted = {"cpu": plan["host"]}
    wanted[device] = wanted.get(device, 0.0) + weights + memory
    for place, need in wanted.items():
        if need > (there := available(place)):
            raise ValueError(
                f"{told}: {need:.3g} GB asked of {place}, which has {there:.3g} GB. Make it shorter, or change "
                f"{key}window (chunks), {key}routed (frames) or {key}place (device, pinned, recomputed)"
            )
    return told


def available(device: str) -> float:
    """GB of a GPU, or of host memory that can still be had."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e9
    told = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
    free = re.search(r"MemAvailable: *(\d+) kB", told)
    return int(free[1]) * 1024e-9 if free else float("inf")


def of_video(record: dict[str, Any], sampling: Mapping[str, Any], seconds: float, device: str) -> str | None:
    """`fit` of a video that a checkpoint streams; None for models without a memory."""
    if record["model"]["class"] != "CausalVideo" or sampling["method"] != "stream":
        return None
    config, stride = record["model"]["config"], record["codec"]["config"].get("stride", (4, 8, 8))  # Wan's
    grid = (size // step for size, step in zip(record["size_hw"], stride[1:]))
    branches = 1 if sampling["sigmas"] or sampling["guidance"] == 1.0 else 2
    frames = 1 + max(0, round(seconds * record["fps"] / stride[0]))
    return fit(
        config, (frames, *grid), record["chunk"], device, weights=parameters(config) * 4e-9, copies=branches,
        bytes_per_number=2 if device == "cuda" else 4, key="memory.",
    )  # fmt: skip


def of_training(cfg: DictConfig, settings: Mapping[str, Any]) -> str | None:
    """`fit` of the rollouts that self-forcing makes, beside student, critic, teacher, average and optimizers.

    settings: of the trainer. None where training makes no rollouts from a memory.
    """
    targets = cfg.model._target_, cfg.training._target_
    if not (targets[0].endswith(".CausalVideo") and targets[1].endswith(".SelfForcing")):
        return None
    config = {k: v for k, v in OmegaConf.to_container(cfg.model, resolve=True).items() if k != "_target_"}
    if (segment := cfg.training.get("segment")) is not None and config.get("place") == "recomputed":
        raise ValueError(
            f"model.place=recomputed makes old commits again with the weights of now, and training.segment={segment} "
            "changes them within a sequence: the memory would not be what was committed; use place=pinned or device"
        )
    sample = Shards(cfg.data.val).read(0)
    frames, *grid = sample.latents.shape[1:]
    if cfg.data.get("frames") is not None:
        frames = 1 + (cfg.data.frames - 1) * (frames - 1) // (len(sample.c2w) - 1)
    numbers = parameters(config) * (4 if cfg.lora.rank else 20)  # weights, gradient, two moments, average in fp32
    if cfg.teacher is not None:
        teacher = checkpoints.read_generator(checkpoints.resolve(Path(cfg.teacher)))["model"]
        if teacher["class"] == "CausalVideo":
            numbers += parameters(teacher["config"]) * 20  # and a critic without an average
    world = settings["devices"] * settings["num_nodes"]
    parts = world // settings["replicas"] if settings["strategy"] == "fsdp" else 1
    device = "cuda" if settings["accelerator"] != "cpu" and torch.cuda.is_available() else "cpu"
    return fit(
        config, (frames, *grid), cfg.training.chunk, device, weights=numbers * 1e-9 / parts,
        copies=cfg.data.micro_batch, bytes_per_number=2 if settings["precision"] == "bf16-mixed" else 4, key="model.",
    )  # fmt: skip
