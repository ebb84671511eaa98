"""Reading and writing weights: safetensors with a config.json beside them, nothing that executes code."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

Adapter = Callable[[dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
_CONFIG = "config.json"


def save_folder(folder: str | Path, class_name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config.json (with `_class_name`) and model.safetensors; each file appears whole or not at all."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial)
    partial.replace(folder / "model.safetensors")
    partial = folder / f"{_CONFIG}.partial"
    partial.write_text(json.dumps({"_class_name": class_name, **config}, indent=2) + "\n")
    partial.replace(folder / _CONFIG)


def load_folder(folder: str | Path, adapters: dict[str, Adapter]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments and tensors of a local folder; `adapters` maps the class names that are understood.

    ValueError or FileNotFoundError name the file, what was found and what is accepted.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {_CONFIG}; give a folder written by save_pretrained or diffusers")
    config = json.loads((folder / _CONFIG).read_text())
    class_name = config.get("_class_name")
    if class_name not in adapters:
        raise ValueError(f"{folder / _CONFIG} describes a {class_name}; accepted: {', '.join(adapters)}")
    files = sorted(p for p in folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated ({error}); copy it again") from error
    return adapters[class_name]({k: v for k, v in config.items() if not k.startswith("_")}, tensors)


def assign(model: nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """Load tensors into a model, all of them or none; logs what matched, ValueError names what does not fit."""
    own = model.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape)
    if missing or unexpected or wrong:
        shapes = [f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}" for k in wrong[:3]]
        raise ValueError(
            f"{source} does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unknown {unexpected[:3]}, {len(wrong)} of another shape {shapes}"
        )
    model.load_state_dict(tensors)
    logger.info("%s: all %d tensors loaded", source, len(own))
