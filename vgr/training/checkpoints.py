"""A run's checkpoints: safetensors and JSON in a folder that is either complete or not pointed to.

    checkpoints/latest                 the name of the newest complete checkpoint
    checkpoints/step_00000120/
        manifest.json                  format version, size and sha256 of every other file
        state.json                     samples_seen, resolved configuration, seconds spent, validation loss
        generator.json                 what sampling needs to rebuild model, text encoder and codec
        weights/ ema/ optimizer/       tensors, sharded by rank, loadable at any world size

A save goes to a temporary folder, is synced to disk, renamed, and only then `latest` is replaced: whatever
moment a run dies at, `latest` names a complete checkpoint. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

FORMAT = 1
_PARTS = ("weights", "ema", "optimizer")


def write_atomic(path: Path, data: str) -> None:
    """Write a text file so that a crash leaves either the old or the new content. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _first_rank() -> bool:
    return not _distributed() or dist.get_rank() == 0


def _barrier() -> None:
    if _distributed():
        dist.barrier()


def _save_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer, no_dist=not _distributed())
        except dcp.api.CheckpointException as error:  # a full disk arrives wrapped, one failure a rank
            for failure, _trace in error.failures.values():
                if isinstance(failure, OSError):
                    raise failure from None
            raise


def _load_tensors(tensors: dict[str, Tensor], folder: Path, *, alone: bool = False) -> None:
    """Fill the given tensors (plain or DTensor) in place; `alone` reads without the other ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors, storage_reader=reader, no_dist=alone or not _distributed())


def _stored_tensors(folder: Path) -> dict[str, Any]:
    """Names with size and dtype of the tensors in one part of a checkpoint."""
    return dict(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `<parameter>:exp_avg` and so on."""
    return {
        f"{name}:{key}": value
        for name, p in module.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    parameters = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {}
    for key, stored in _stored_tensors(folder).items():
        name, _, slot = key.rpartition(":")
        if name not in parameters:
            raise ValueError(f"{folder}: optimizer state of `{name}`, which this model does not have")
        p = parameters[name]
        scalar = len(stored.size) == 0  # AdamW's step count; the fused kernel wants it beside the parameter
        tensors[key] = torch.zeros((), device=p.device) if scalar else torch.zeros_like(p.detach())
        optimizer.state[p][slot] = tensors[key]
    _load_tensors(tensors, folder)


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    generator: dict[str, Any],
) -> Path:
    """Write checkpoints/step_<step> under `folder` and point `latest` to it; all ranks call this together.

    tensors: one dict (plain or DTensor values) for each of weights, ema, optimizer. Raises OSError, for
    example on a full disk, with the previous checkpoint untouched and nothing half-written left.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".saving_{final.name}"
    if latest(folder) == final:
        return final
    try:
        if _first_rank():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _barrier()
        for part in _PARTS:
            if tensors.get(part):
                _save_tensors(tensors[part], temporary / part)
        _barrier()
        if _first_rank():
            _publish(temporary, final, state, generator)
        _barrier()
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _publish(temporary: Path, final: Path, state: dict[str, Any], generator: dict[str, Any]) -> None:
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    (temporary / "generator.json").write_text(json.dumps(generator, indent=1))
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        name = path.relative_to(temporary).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    for path in temporary.rglob("*/"):
        _sync_folder(path)
    write_atomic(temporary / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
    if final.exists():  # a complete folder that an interrupted run never pointed to
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    point_latest(final)


def point_latest(checkpoint: Path) -> None:
    """Make `checkpoint` the one that `resume: auto` continues from."""
    write_atomic(checkpoint.parent / "latest", checkpoint.name + "\n")


def latest(folder: Path) -> Path | None:
    """The checkpoint that `<folder>/latest` names, None before the first save; ValueError if it is gone."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    checkpoint = folder / Path(pointer.read_text().strip()).name
    if not checkpoint.is_dir():
        raise ValueError(f"{pointer} names {checkpoint.name}, which is missing.{_previous_good(checkpoint)}")
    return checkpoint


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None; every byte is read."""
    manifest_path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text())
        version, files = manifest["format"], manifest["files"]
    except FileNotFoundError:
        return f"{manifest_path} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{manifest_path} is not a checkpoint manifest"
    if version != FORMAT:
        return f"{manifest_path} has format {version}, this version reads format {FORMAT}"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{path} has {path.stat().st_size} bytes, its manifest says {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{path} does not have the sha256 of its manifest"
    return None


def verify(checkpoint: Path) -> None:
    """Raise FileNotFoundError or ValueError naming the damaged file and the previous good checkpoint."""
    if not checkpoint.is_dir():
        raise FileNotFoundError(2, "no such checkpoint folder", str(checkpoint))
    problem = damage(checkpoint)
    if problem:
        raise ValueError(f"checkpoint cannot be used: {problem}.{_previous_good(checkpoint)}")


def _previous_good(checkpoint: Path) -> str:
    older = [p for p in checkpoint.parent.glob("step_*") if p.name < checkpoint.name]
    for path in sorted(older, reverse=True):
        if damage(path) is None:
            return f" The previous good one is {path}: resume={path} continues from it"
    return " No earlier good checkpoint is left in this run"


def resolve(path: Path) -> Path:
    """The checkpoint a user means by its own folder, its checkpoints/ folder or the run's folder.

    Raises FileNotFoundError if there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / "latest").is_file():
            return latest(folder)
    if (path / "manifest.json").is_file() or path.name.startswith("step_") and path.is_dir():
        return path
    raise FileNotFoundError(2, "no checkpoint here; give a run folder or a step_XXXXXXXX folder", str(path))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())


def read_generator(checkpoint: Path) -> dict[str, Any]:
    """generator.json of a checkpoint: classes and constructor arguments for sampling."""
    return json.loads((checkpoint / "generator.json").read_text())


def read_weights(checkpoint: Path, part: str = "ema", prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors of `weights` or `ema` on the CPU, names stripped of `prefix` ("model." or "text.").

    The checkpoint is verified first (ValueError naming the file).
    """
    verify(checkpoint)
    folder = checkpoint / part
    tensors = {
        name: torch.empty(tuple(stored.size), dtype=stored.properties.dtype)
        for name, stored in _stored_tensors(folder).items()
        if name.startswith(prefix)
    }
    _load_tensors(tensors, folder, alone=True)
    return {name[len(prefix) :]: value for name, value in tensors.items()}


def restore(
    checkpoint: Path,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor],
    module: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Fill weights and EMA in place from a verified checkpoint, and the optimizer over module's parameters.

    Raises ValueError if names or shapes differ.
    """
    for part, tensors in (("weights", weights), ("ema", ema)):
        stored = {name: info.size for name, info in _stored_tensors(checkpoint / part).items()}
        match(tensors, stored, checkpoint / part)
        _load_tensors(tensors, checkpoint / part)
    if optimizer is not None and (checkpoint / "optimizer").is_dir():
        _restore_optimizer(module, optimizer, checkpoint / "optimizer")


def match(tensors: dict[str, Tensor], stored: dict[str, Sequence[int]], where: Path) -> None:
    """Refuse (ValueError) tensors that differ in name or shape from the stored ones."""
    named = [f"`{name}` is on one side only" for name in sorted(set(tensors) ^ set(stored))]
    named += [
        f"`{name}` is {tuple(stored[name])} there, {tuple(tensors[name].shape)} here"
        for name in tensors
        if name in stored and tuple(tensors[name].shape) != tuple(stored[name])
    ]
    if named:
        count = f"{len(named)} differences"
        raise ValueError(f"{where} does not fit this model: {'; '.join(named[:3])} ({count})")


def prune(folder: Path, keep: int) -> None:
    """Remove old checkpoints: the newest `keep`, the pointed-to and the one of least validation loss stay."""
    current = latest(folder)
    if not _first_rank() or current is None:
        return
    complete = [p for p in sorted(folder.glob("step_*")) if p.name <= current.name]
    losses = {p: read_state(p).get("val_loss") for p in complete}
    scored = {p: loss for p, loss in losses.items() if loss is not None}
    best = min(scored, key=scored.get) if scored else None
    for path in complete[:-keep]:
        if path not in (best, current):
            doomed = path.with_name(f".removing_{path.name}")  # never a half-removed folder under a good name
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
