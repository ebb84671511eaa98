"""A run's checkpoints: safetensors and JSON in a folder that is either complete or not pointed to.

    checkpoints/latest                 the name of the newest complete checkpoint
    checkpoints/step_00000120/
        manifest.json                  format version and sha256 of every other file
        state.json                     samples_seen, resolved configuration, seconds spent
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from vgr.data.files import sync_folder, write_text

FORMAT = 1


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _barrier() -> None:
    if _distributed():
        dist.barrier()


def _dcp(call: Callable[..., Any], tensors: dict[str, Tensor], alone: bool = False, **storage: Any) -> None:
    """dcp.save or dcp.load, on one process as well; `alone` leaves the other ranks out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        call(tensors, no_dist=alone or not _distributed(), **storage)


def _load_tensors(tensors: dict[str, Tensor], folder: Path, alone: bool = False) -> None:
    """Fill the given tensors (plain or DTensor) in place."""
    _dcp(dcp.load, tensors, alone, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def _stored_tensors(folder: Path) -> dict[str, Any]:
    """Names with size and dtype of the tensors in one part of a checkpoint."""
    return dict(dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def optimizer_tensors(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by parameter name: `<parameter>:exp_avg` and so on. No two share a parameter."""
    return {
        f"{name}:{key}": value
        for name, p in module.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def _restore_optimizers(module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], folder: Path) -> None:
    parameters = dict(module.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    tensors: dict[str, Tensor] = {}
    for key, stored in _stored_tensors(folder).items():
        name, _, slot = key.rpartition(":")
        p = parameters[name]
        scalar = len(stored.size) == 0  # AdamW's step count; the fused kernel wants it beside the parameter
        tensors[key] = torch.zeros((), device=p.device) if scalar else torch.zeros_like(p.detach())
        owner[p].state[p][slot] = tensors[key]
    _load_tensors(tensors, folder)


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    generator: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write checkpoints/step_<step> under `folder` and point `latest` to it; all ranks call this together.

    tensors: one dict (plain or DTensor values) for each of weights, ema, optimizer; the newest `keep`
    checkpoints stay. Raises OSError, for example on a full disk, with the previous checkpoint untouched and
    nothing half-written left.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".saving_{final.name}"
    first_rank = not _distributed() or dist.get_rank() == 0
    try:
        if first_rank:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _barrier()
        for part in filter(tensors.get, tensors):
            writer = dcp.HuggingFaceStorageWriter(str(temporary / part), save_distributed=True)
            _dcp(dcp.save, tensors[part], storage_writer=writer)
        _barrier()
        if first_rank:
            _publish(temporary, final, state, generator)
            _prune(final, keep)
        _barrier()
    except (OSError, dcp.api.CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        failures = [failure for failure, _trace in getattr(error, "failures", {}).values()]
        # A full disk arrives wrapped, one failure a rank.
        raise next((f for f in failures if isinstance(f, OSError)), error) from None
    return final


def _publish(temporary: Path, final: Path, state: dict[str, Any], generator: dict[str, Any]) -> None:
    (temporary / "state.json").write_text(json.dumps(state, indent=1))
    (temporary / "generator.json").write_text(json.dumps(generator, indent=1))
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        files[path.relative_to(temporary).as_posix()] = {"sha256": _sha256(path)}
    for path in temporary.rglob("*/"):
        sync_folder(path)
    write_text(temporary / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
    if final.exists():  # a complete folder that an interrupted run never pointed to
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_folder(final.parent)
    point_latest(final)


def _prune(newest: Path, keep: int) -> None:
    for path in sorted(p for p in newest.parent.glob("step_*") if p.name <= newest.name)[:-keep]:
        doomed = path.with_name(f".removing_{path.name}")  # never a half-removed folder under a good name
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def point_latest(checkpoint: Path) -> None:
    """Make `checkpoint` the one that `resume: auto` continues from."""
    write_text(checkpoint.parent / "latest", checkpoint.name + "\n")


def latest(folder: Path) -> Path | None:
    """The checkpoint that `<folder>/latest` names, None before the first save."""
    pointer = folder / "latest"
    return folder / Path(pointer.read_text().strip()).name if pointer.is_file() else None


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
        if _sha256(path) != expected["sha256"]:
            return f"{path} is damaged, its sha256 is not that of the manifest"
    return None


def verify(checkpoint: Path) -> None:
    """Raise ValueError naming a missing or damaged file and the previous good checkpoint."""
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
    if (path / "manifest.json").is_file():
        return path
    raise FileNotFoundError(2, "no checkpoint here; give a run folder or a step_XXXXXXXX folder", str(path))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())


def read_generator(checkpoint: Path) -> dict[str, Any]:
    """generator.json of a checkpoint: classes and constructor arguments for sampling."""
    return json.loads((checkpoint / "generator.json").read_text())


def read_weights(checkpoint: Path, part: str = "ema") -> dict[str, Tensor]:
    """Whole tensors of `weights` or `ema` on the CPU; the checkpoint is verified first (ValueError)."""
    verify(checkpoint)
    stored = _stored_tensors(checkpoint / part)
    tensors = {name: torch.empty(tuple(x.size), dtype=x.properties.dtype) for name, x in stored.items()}
    _load_tensors(tensors, checkpoint / part, alone=True)
    return tensors


def weights_hash(checkpoint: Path, part: str = "ema") -> str:
    """`tensors_hash` of a verified part (ValueError if damaged)."""
    return tensors_hash(read_weights(checkpoint, part))


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 of sorted names, dtypes, shapes and bytes.

    Equal weights have equal hashes, which their files, with headers in any order and sharded by rank, have not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def restore(
    checkpoint: Path,
    weights: dict[str, Tensor],
    ema: dict[str, Tensor],
    module: nn.Module | None = None,
    optimizers: Sequence[torch.optim.Optimizer] = (),
) -> None:
    """Fill weights and EMA in place from a verified checkpoint, and the optimizers over module's parameters.

    Raises ValueError if names or shapes differ.
    """
    for part, tensors in (("weights", weights), ("ema", ema)):
        stored = {name: info.size for name, info in _stored_tensors(checkpoint / part).items()}
        match(tensors, stored, checkpoint / part)
        _load_tensors(tensors, checkpoint / part)
    if optimizers:
        _restore_optimizers(module, optimizers, checkpoint / "optimizer")


def match(tensors: dict[str, Tensor], stored: dict[str, Sequence[int]], where: Path) -> None:
    """Refuse (ValueError) tensors that differ in name or shape from the stored ones."""
    named = [f"`{name}` is on one side only" for name in sorted(set(tensors) ^ set(stored))]
    named += [
        f"`{name}` is {tuple(stored[name])} there, {tuple(tensors[name].shape)} here"
        for name in tensors
        if name in stored and tuple(tensors[name].shape) != tuple(stored[name])
    ]
    if named:
        raise ValueError(f"{where} does not fit this model: {'; '.join(named[:3])} ({len(named)} differences)")
