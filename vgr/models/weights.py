"""Reading and writing weights: safetensors with a config.json beside them, nothing that executes code.

Foreign PyTorch files are read with weights_only=True, which refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Adapter = Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
Model = TypeVar("Model", bound=nn.Module)
UNUSED = "unused."  # prefix of tensors that a release holds, its model does not read, and a re-export writes again
_CONFIG = "config.json"
_STEMS = ("model", "diffusion_pytorch_model")


def require_new(folder: Path) -> None:
    """Refuse (FileExistsError) a name that something other than an empty folder has."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; give a new folder or remove it")


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill that takes its name once the block ends well; after an error nothing is left.

    FileExistsError if something that is not an empty folder has the name.
    """
    folder = Path(folder).resolve()
    require_new(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for path in part.iterdir():
            path.chmod(part.stat().st_mode & 0o666)  # safetensors writes for the owner only
            with path.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def save_folder(
    folder: str | Path, class_name: str | None, config: dict[str, Any], tensors: dict[str, Tensor], stem: str = "model"
) -> None:
    """Write <stem>.safetensors and, with a class name, config.json: the folder appears whole or not at all."""
    from safetensors.torch import save_file

    with new_folder(folder) as part:
        cpu = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(cpu, part / f"{stem}.safetensors", metadata={"format": "pt"})
        if class_name is not None:
            (part / _CONFIG).write_text(json.dumps({"_class_name": class_name, **config}, indent=2) + "\n")


def fetch(source: str | Path, revision: str | None, patterns: Sequence[str], how_to_get: str) -> Path:
    """A local file or folder as it is; else the files of hub id `source` that match `patterns`, at `revision`.

    FileNotFoundError, ending with `how_to_get`, if it is neither or cannot be fetched.
    """
    if Path(source).exists():
        return Path(source)
    if revision is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(
            f"{source} is no file or folder here; a hub id (organisation/name) needs revision=<commit>. {how_to_get}"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(patterns)))
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(f"{source} at {revision} could not be fetched ({reason}). {how_to_get}") from error


def load_folder(
    source: str | Path, adapters: dict[str | None, Adapter], inside: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and tensors of a local folder or of one weights file.

    adapters: the class names of config.json that are understood, None for weights without one. inside: subfolders
    in which weights are sought too. ValueError or FileNotFoundError name the file, what was found and what is accepted.
    """
    source = Path(source)
    files = [source]
    if source.is_dir():
        files = next(filter(None, (_weight_files(f) for f in (source, *(source / name for name in inside)))), [])
    if not files:
        raise FileNotFoundError(f"{source} holds no weights: no model.safetensors beside a {_CONFIG}, nor any other")
    path = files[0].parent / _CONFIG
    config = _json(path) if path.is_file() else {}
    class_name = config.get("_class_name")
    if class_name not in adapters:
        raise ValueError(f"{path} describes a {class_name}; accepted: {', '.join(filter(None, adapters))}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_tensors(file))
    try:
        return adapters[class_name]({k: v for k, v in config.items() if not k.startswith("_")}, tensors)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON table ({error}); copy it again") from error


def _weight_files(folder: Path) -> list[Path]:
    """One whole file, all shards of an index, or the only file there is; [] if there is none."""
    if not folder.is_dir():
        return []
    for stem in _STEMS:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            files = [folder / Path(name).name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise FileNotFoundError(f"{folder} misses {len(missing)} of {len(files)} shards: {missing[:3]}")
            return files
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} weight files ({', '.join(p.name for p in files[:3])}); name one")
    return files


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or a PyTorch file, mapped from disk. ValueError if damaged or more than tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{file} is damaged or truncated, or no .safetensors or PyTorch (zip) file; copy it again")
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); copy it again") from error
    except UnpicklingError as error:
        raise ValueError(f"{file} holds Python objects, not only tensors; reading them could run code") from error
    for name in ("generator", "state_dict"):  # trainers nest the model beside their own state
        if isinstance(data, dict) and isinstance(data.get(name), dict):
            data = data[name]
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise ValueError(f"{file} holds no table of tensors, neither at its top nor under `generator` or `state_dict`")
    return data


def build(model_class: type[Model], config: dict[str, Any], meta: bool = True) -> Model:
    """The model of a configuration; meta: without memory, to be given its tensors. ValueError names unknown keys."""
    known = inspect.signature(model_class).parameters
    unknown = sorted(config.keys() - known)
    if unknown:
        raise ValueError(f"{model_class.__name__} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    with torch.device("meta") if meta else contextlib.nullcontext():
        return model_class(**config)


def check(model: nn.Module, tensors: dict[str, Tensor], source: str | Path, partial: bool = False) -> None:
    """Refuse (ValueError) tensors that do not fit the model's, unless `partial`, or that are not finite."""
    own = model.state_dict()
    given = {k: v for k, v in tensors.items() if not k.startswith(UNUSED)}
    missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & given.keys() if own[k].shape != given[k].shape)
    shapes = [f"{k} {tuple(given[k].shape)} for {tuple(own[k].shape)}" for k in wrong[:3]]
    text = (
        f"{source} does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
        f"{len(unknown)} unknown {unknown[:3]}, {len(wrong)} of another shape {shapes}"
    )
    if (missing or unknown or wrong) and not partial:
        raise ValueError(f"{text}; from_pretrained(partial=True) takes what fits")
    if missing or unknown or wrong:
        logger.warning("%s", text)
    broken = sorted(k for k, v in given.items() if not torch.isfinite(v).all())
    if broken:
        raise ValueError(f"{source} holds NaN or infinite values in {len(broken)} tensors {broken[:3]}; get it again")


def assign(
    model: nn.Module,
    tensors: dict[str, Tensor],
    source: str | Path,
    partial: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give a model, on the meta device or not, copies of its tensors: all or, with `partial`, those that fit.

    Logs how many matched; ValueError as in `check`.
    """
    check(model, tensors, source, partial)
    own = model.state_dict()
    fit = {k: v.to(dtype, copy=True) for k, v in tensors.items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(fit, strict=False, assign=True)
    logger.info("%s: %d of the model's %d tensors loaded", source, len(fit), len(own))


def load(
    model_class: type[Model],
    names: ModuleType,
    source: str | Path,
    revision: str | None,
    partial: bool,
    dtype: torch.dtype,
    settings: dict[str, Any],
) -> Model:
    """`from_pretrained` of a model whose translations (PATTERNS, HOW_TO_GET, ADAPTERS, INSIDE) stand in `names`."""
    path = fetch(source, revision, names.PATTERNS, names.HOW_TO_GET)
    config, tensors = load_folder(path, names.ADAPTERS, names.INSIDE)
    model = build(model_class, {**config, **settings}, meta=not partial)
    assign(model, tensors, path, partial, dtype)
    return model
