"""Where LTX-2's parts lie in the releases, which of its weights are audio's, and LoRA files for it (spec 7, 10.1)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vgr.models import weights

HOW_TO_GET = (
    "The released refiners (38 GB, LTX-2 community licence) are refiner/ of Efficient-Large-Model/"
    "SANA-WM_bidirectional and refiner_diffusers/ of SANA-WM_streaming, each with transformer/ and connectors/"
)
LORA_TARGETS = [f"{a}.to_{x}" for a in ("attn1", "attn2") for x in ("q", "k", "v", "out.0")]
LORA_TARGETS += ["ff.net.0.proj", "ff.net.2"]
_ROOTS = ("", "refiner/", "refiner_diffusers/")
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")


def read(
    source: str | Path, revision: str | None, part: str, class_name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of `part` (transformer, connectors) in a folder or hub id; or of a folder that is it.

    ValueError or FileNotFoundError name what is missing and how to get it.
    """
    path = weights.fetch(source, revision, [f"{root}{part}/*" for root in _ROOTS], HOW_TO_GET)
    folder = next((path / f"{root}{part}" for root in _ROOTS if (path / f"{root}{part}").is_dir()), path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no {part}/ with a config.json. {HOW_TO_GET}")
    return weights.load_folder(folder, {class_name: lambda config, tensors: (config, tensors)})


def is_audio(name: str) -> bool:
    """Of a layer or weight: does only sound need it?"""
    return any(part in name for part in ("audio", "a2v", "av_cross"))


def read_lora(file: str | Path, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """An adapter's tensors without audio's, under the model's names, and the configuration written with them.

    PEFT's and diffusers' keys are read. ValueError listing the keys that do not fit the model's linear layers.
    """
    from safetensors import safe_open

    file = Path(file)
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(f"lora={file} is no .safetensors file; give the file of the adapter's weights")
    tensors = {}
    for key, tensor in weights.read_tensors(file).items():
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        if not is_audio(key):
            tensors[key] = tensor
    wrong = _misfits(tensors, {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"{file} does not fit the refiner: {'; '.join(wrong[:10])}{more}")
    with safe_open(file, "pt") as opened:
        written = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return tensors, {k.removeprefix("transformer."): v for k, v in written.items()} or None


def _misfits(tensors: dict[str, Tensor], layers: dict[str, nn.Linear]) -> list[str]:
    """What is wrong with an adapter, a line a key."""
    wrong = [] if tensors else ["it has no tensors for the video transformer"]
    for key, tensor in sorted(tensors.items()):
        name, _, side = key.removesuffix(".weight").rpartition(".lora_")
        twin = f"{name}.lora_{'B' if side == 'A' else 'A'}.weight"
        if side not in ("A", "B") or name not in layers:
            wrong.append(f"{key} belongs to no linear layer")
        elif twin not in tensors:
            wrong.append(f"{twin} is missing")
        else:
            # A is (rank, in) and B (out, rank).
            outside, inside = (layers[name].in_features, 0) if side == "A" else (layers[name].out_features, 1)
            if tensor.shape[1 - inside] != outside or tensor.shape[inside] != tensors[twin].shape[1 - inside]:
                layer = f"{layers[name].in_features} -> {layers[name].out_features}"
                wrong.append(f"{key} {tuple(tensor.shape)} beside {tuple(tensors[twin].shape)} for {layer}")
    return wrong
