"""A run's checkpoints: safetensors and JSON in a folder that is either complete or not pointed to.

    checkpoints/latest                 the name of the newest complete checkpoint
    checkpoints/best                   a link to the one of least validation loss
    checkpoints/step_00000120/
        manifest.json                  format version and sha256 of every other file
        state.json                     samples_seen, resolved configuration, seconds spent, validation loss
        generator.json                 what sampling needs to rebuild model, text encoder and codec
        weights/ ema/ optimizer/       tensors, sharded by rank, loadable at any world size

What is written by `vgr.training.saving` is found, verified and read here. No file is ever pickled.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from vgr.data.files import write_text

FORMAT = 1
# For good, not around each call: `catch_warnings` is the whole process's, and a save has a thread of its own.
warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process.*")


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256s(paths: Iterable[Path]) -> list[str]:
    """Hex sha256 of files, in their order."""
    with ThreadPoolExecutor(8) as pool:  # hashing leaves the interpreter free, and one thread reads 1.5 GB/s
        return list(pool.map(_sha256, paths))


def distributed() -> bool:
    """Whether there are other ranks to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def load_tensors(tensors: dict[str, Tensor], folder: Path, alone: bool = False) -> None:
    """Fill the given tensors (plain or DTensor) in place."""
    dcp.load(
        tensors,
        storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
        no_dist=alone or not distributed(),
    )


def stored_tensors(folder: Path) -> dict[str, Any]:
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
    for key, stored in stored_tensors(folder).items():
        name, _, slot = key.rpartition(":")
        p = parameters[name]
        scalar = len(stored.size) == 0  # AdamW's step count; the fused kernel wants it beside the parameter
        tensors[key] = torch.zeros((), device=p.device) if scalar else torch.zeros_like(p.detach())
        owner[p].state[p][slot] = tensors[key]
    load_tensors(tensors, folder)


def point_latest(checkpoint: Path) -> None:
    """Make `checkpoint` the one that `resume: auto` continues from."""
    write_text(checkpoint.parent / "latest", checkpoint.name + "\n")


def latest(folder: Path) -> Path | None:
    """The checkpoint that `<folder>/latest` names, None before the first save."""
    pointer = folder / "latest"
    return folder / Path(pointer.read_text().strip()).name if pointer.is_file() else None


def best(folder: Path) -> Path | None:
    """Of the checkpoints up to `latest` the one of least validation loss, None if none was validated."""
    newest = latest(folder)
    found = sorted(p for p in folder.glob("step_*") if newest is not None and p.name <= newest.name)
    lowest = min(found, key=validation_loss, default=None)
    return lowest if lowest is not None and validation_loss(lowest) < math.inf else None


def validation_loss(checkpoint: Path) -> float:
    """Of the weights that a checkpoint was saved with; infinite where that was not measured."""
    with contextlib.suppress(OSError, ValueError):
        loss = read_state(checkpoint).get("validation_loss")
        return math.inf if loss is None else loss
    return math.inf


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None; every byte is read. Raises ValueError for another format."""
    manifest_path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text())
        version, files = manifest["format"], manifest["files"]
    except OSError as error:  # missing, or a disk that does not give it
        return str(error)
    except (ValueError, KeyError, TypeError):
        return f"{manifest_path} is not a checkpoint manifest"
    if version != FORMAT:
        raise ValueError(
            f"{manifest_path} has format {version}, this version reads format {FORMAT}: take the version of vgr that "
            "wrote it"
        )
    try:
        digests = sha256s(checkpoint / name for name in files)
    except OSError as error:
        return str(error)
    for name, digest in zip(files, digests):
        if digest != files[name]["sha256"]:
            return f"{checkpoint / name} is damaged, its sha256 is not that of the manifest"
    return None


def verify(checkpoint: Path) -> None:
    """Raise ValueError naming a missing or damaged file and the previous good checkpoint."""
    if problem := damage(checkpoint):
        older, _ = _newest_good(_up_to(checkpoint)[1:])
        told = f"The previous good one is {older}: resume={older} continues from it"
        told = told if older else "No earlier good checkpoint is left in this run"
        raise ValueError(f"checkpoint cannot be used: {problem}. {told}")


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume: auto` continues from, None before the first save, and what is wrong with later ones.

    Raises ValueError if none is left, or one that would be is of another format: that is not damage.
    """
    newest = latest(folder)
    if newest is None:
        return None, []
    good, wrong = _newest_good(_up_to(newest))
    if good is None:
        raise ValueError(f"no checkpoint can be used: {'; '.join(wrong)}. Remove {folder.parent} to begin anew")
    return good, wrong


def _up_to(checkpoint: Path) -> list[Path]:
    """The checkpoint, whether it is there or not, and the earlier ones of its run, newest first."""
    older = (p for p in checkpoint.parent.glob("step_*") if p.name < checkpoint.name)
    return [checkpoint, *sorted(older, reverse=True)]


def _newest_good(paths: Sequence[Path]) -> tuple[Path | None, list[str]]:
    wrong = []
    for path in paths:
        if (problem := damage(path)) is None:
            return path, wrong
        wrong.append(problem)
    return None, wrong


def resolve(path: Path) -> Path:
    """The checkpoint a user means by its own folder, checkpoints/best, its checkpoints/ folder or the run's folder.

    Raises FileNotFoundError if there is none.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / "latest").is_file():
            return latest(folder)
    if (path / "manifest.json").is_file():
        return path.resolve() if path.is_symlink() else path
    told = "no checkpoint here; give a run folder, its checkpoints/best or a step_XXXXXXXX folder"
    raise FileNotFoundError(2, told, str(path))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())


def read_generator(checkpoint: Path) -> dict[str, Any]:
    """generator.json of a checkpoint: classes and constructor arguments for sampling."""
    return json.loads((checkpoint / "generator.json").read_text())


def read_weights(checkpoint: Path, part: str = "ema") -> dict[str, Tensor]:
    """Whole tensors of `weights` or `ema` on the CPU; the checkpoint is verified first (ValueError)."""
    verify(checkpoint)
    stored = stored_tensors(checkpoint / part)
    tensors = {name: torch.empty(tuple(x.size), dtype=x.properties.dtype) for name, x in stored.items()}
    load_tensors(tensors, checkpoint / part, alone=True)
    return tensors


class Stored(Mapping[str, Tensor]):
    """One part of a checkpoint; a tensor is read, whole and to the CPU, when it is asked for.

    prefix: of the names that are meant, which are told without it. ValueError if the checkpoint is damaged.
    """

    def __init__(self, checkpoint: Path, part: str = "ema", prefix: str = "") -> None:
        verify(checkpoint)
        self._folder, self._prefix, self._stored = checkpoint / part, prefix, stored_tensors(checkpoint / part)

    def under(self, prefix: str) -> Stored:
        """Those whose names begin with `prefix`, without it."""
        part = copy.copy(self)
        part._prefix = self._prefix + prefix
        return part

    def shapes(self) -> dict[str, Tensor]:
        """All of them on the meta device."""
        told = ((name, self._stored[self._prefix + name]) for name in self)
        return {name: torch.empty(tuple(x.size), dtype=x.properties.dtype, device="meta") for name, x in told}

    def __getitem__(self, name: str) -> Tensor:
        info = self._stored[self._prefix + name]
        tensors = {self._prefix + name: torch.empty(tuple(info.size), dtype=info.properties.dtype)}
        load_tensors(tensors, self._folder, alone=True)
        return tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._stored if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def weights_hash(checkpoint: Path, part: str = "ema") -> str:
    """`tensors_hash` of a verified part (ValueError if damaged)."""
    return tensors_hash(read_weights(checkpoint, part))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of sorted names, dtypes, shapes and bytes.

    Equal weights have equal hashes, which their files, with headers in any order and sharded by rank, have not.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
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
        stored = {name: info.size for name, info in stored_tensors(checkpoint / part).items()}
        match(tensors, stored, checkpoint / part)
        load_tensors(tensors, checkpoint / part)
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
