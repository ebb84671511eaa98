"""Where LTX-2's parts lie in the releases, its transformer's weights under our names, and LoRA files (spec 7, 10.1)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vgr.models import weights

HOW_TO_GET = (
    "The released refiners (38 GB, LTX-2 community licence) are refiner/ of Efficient-Large-Model/"
    "SANA-WM_bidirectional and refiner_diffusers/ of SANA-WM_streaming, each with transformer/ and connectors/; what "
    "adapters are trained on is the undistilled Lightricks/LTX-2 (transformer/, 38 GB, connectors/ and text_encoder/, "
    "Gemma 3 12B, the same licence and Gemma's)"
)
_ROOTS = ("", "refiner/", "refiner_diffusers/")
INSIDE = tuple(f"{root}transformer" for root in _ROOTS)
PATTERNS = tuple(f"{folder}/*" for folder in INSIDE)
_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
_CLASS = "LTX2VideoTransformer3DModel"
_SIZES = {
    "in_channels": "in_channels", "text_width": "caption_channels", "heads": "num_attention_heads",
    "head_dim": "attention_head_dim", "layers": "num_layers",
}  # fmt: skip
# LTX-2's values of what later versions changed.
_LTX2 = {
    "gated_attn": False, "cross_attn_mod": False, "perturbed_attn": False, "use_keyframes_abs_pos_embedding": False,
    "use_prompt_embeddings": True, "patch_size": 1, "patch_size_t": 1,
}  # fmt: skip


def find(source: str | Path, revision: str | None, part: str) -> Path:
    """The folder of `part` (transformer, connectors) in a folder or hub id, or `source` if it is that folder.

    FileNotFoundError names what is missing and how to get it.
    """
    path = weights.fetch(source, revision, [f"{root}{part}/*" for root in _ROOTS], HOW_TO_GET)
    folder = next((path / f"{root}{part}" for root in _ROOTS if (path / f"{root}{part}").is_dir()), path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no {part}/ with a config.json. {HOW_TO_GET}")
    return folder


def is_audio(name: str) -> bool:
    """Of a layer, weight or setting: does only sound need it?"""
    return any(part in name for part in ("audio", "a2v", "av_cross", "cross_attn_timestep"))


def to_diffusers(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our constructor's arguments and tensors as diffusers' transformer has them, sound as small as it can be.

    ValueError for the transformer of a later version.
    """
    named: dict[str, Any] = {theirs: config[ours] for ours, theirs in _SIZES.items()}
    named |= {"out_channels": config["in_channels"], "cross_attention_dim": config["heads"] * config["head_dim"]}
    sound = {"in_channels": 1, "out_channels": 1, "num_attention_heads": 1, "attention_head_dim": 2}
    named |= {f"audio_{k}": v for k, v in {**sound, "cross_attention_dim": 2}.items()}
    named |= {"rope_type": "split", **config["options"]}
    other = [f"{k}={named[k]}" for k, v in _LTX2.items() if named.get(k, v) != v]
    if other:
        raise ValueError(
            f"the refiner is LTX-2's transformer; this one has {', '.join(other)}, as later versions do. {HOW_TO_GET}"
        )
    return named, {k.removeprefix("transformer."): v for k, v in tensors.items()}


def from_diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse, without sound: arguments, `options` among them where something is not LTX-2's, and tensors."""
    from diffusers import LTX2VideoTransformer3DModel

    plain = {k: p.default for k, p in inspect.signature(LTX2VideoTransformer3DModel).parameters.items()}
    sizes = {ours: config.get(theirs, plain[theirs]) for ours, theirs in _SIZES.items()}
    plain = json.loads(json.dumps({**plain, **to_diffusers({**sizes, "options": {}}, {})[0]}))  # lists, as in files
    options = {k: v for k, v in config.items() if not is_audio(k) and plain.get(k) != v}
    video = {f"transformer.{k}": v for k, v in tensors.items() if not is_audio(k)}
    return {**sizes, "options": options}, video


# Reading and writing, as of the other models.
ADAPTERS = {_CLASS: from_diffusers}
EXPORTS = {"diffusers": (_CLASS, "diffusion_pytorch_model", to_diffusers)}


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
