"""The causal video model's weights in other people's names: Wan 2.1's own and diffusers' (spec 2.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INSIDE = ("transformer",)
PATTERNS = ("config.json", "model*", "diffusion_pytorch_model*", "transformer/*")
HOW_TO_GET = (
    "Released weights: `hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --include 'transformer/*'` (5.7 GB) or "
    "Wan2.1-T2V-14B-Diffusers (57 GB), Apache-2.0"
)
# Ours, the original's and diffusers' beginnings of names, at the top or inside a block.
_NAMES = (
    ("patch_embed.", "patch_embedding.", "patch_embedding."),
    ("text_proj.0.", "text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_proj.2.", "text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("time_embed.0.", "time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embed.2.", "time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_proj.", "time_projection.1.", "condition_embedder.time_proj."),
    ("final_table", "head.modulation", "scale_shift_table"),
    ("final.", "head.head.", "proj_out."),
)
_BLOCK_NAMES = (
    ("table", "modulation", "scale_shift_table"),
    ("cross_norm.", "norm3.", "norm2."),
    ("ffn.0.", "ffn.0.", "ffn.net.0.proj."),
    ("ffn.2.", "ffn.2.", "ffn.net.2."),
    ("attn.q_norm.", "self_attn.norm_q.", "attn1.norm_q."),
    ("attn.k_norm.", "self_attn.norm_k.", "attn1.norm_k."),
    ("attn.proj.", "self_attn.o.", "attn1.to_out.0."),
    ("cross.q_norm.", "cross_attn.norm_q.", "attn2.norm_q."),
    ("cross.k_norm.", "cross_attn.norm_k.", "attn2.norm_k."),
    ("cross.proj.", "cross_attn.o.", "attn2.to_out.0."),
    ("cross.q.", "cross_attn.q.", "attn2.to_q."),
)
# Projections that are one layer of ours.
_FUSED = (
    ("attn.qkv.", ("self_attn.q.", "self_attn.k.", "self_attn.v."), ("attn1.to_q.", "attn1.to_k.", "attn1.to_v.")),
    ("cross.kv.", ("cross_attn.k.", "cross_attn.v."), ("attn2.to_k.", "attn2.to_v.")),
)
_ORIGINAL, _DIFFUSERS = 1, 2


def own(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return config, tensors


def from_diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A diffusers configuration and its tensors in our names and shapes. ValueError for a model of another kind."""
    accepted = {
        "patch_size": [1, 2, 2], "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6,
        "image_dim": None, "added_kv_proj_dim": None, "freq_dim": 256,
    }  # fmt: skip
    for key, wanted in accepted.items():
        given = config.get(key, wanted)
        if (list(given) if isinstance(given, tuple) else given) != wanted:
            raise ValueError(f"config.json has {key}={given}; the causal video model is Wan 2.1 T2V's, {key}={wanted}")
    ours = _to_ours(tensors, _DIFFUSERS)
    return {**_arguments(ours), "heads": config["num_attention_heads"]}, ours


def from_original(_config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Wan 2.1's own file, or a trainer's that nests it under `model.`; heads are 128 wide."""
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    ours = _to_ours(plain, _ORIGINAL)
    arguments = _arguments(ours)
    return {**arguments, "heads": max(1, arguments["width"] // 128)}, ours


def to_diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of diffusers' `WanTransformer3DModel`."""
    return {
        "patch_size": [1, 2, 2], "num_attention_heads": config["heads"],
        "attention_head_dim": config["width"] // config["heads"], "in_channels": config["in_channels"],
        "out_channels": config["in_channels"], "text_dim": config["text_width"], "freq_dim": 256,
        "ffn_dim": config["ffn_width"], "num_layers": config["layers"], "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
    }, _to_theirs(tensors, _DIFFUSERS)  # fmt: skip


def to_original(_config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Wan 2.1's own names and shapes."""
    return {}, _to_theirs(tensors, _ORIGINAL)


def _to_theirs(tensors: dict[str, Tensor], column: int) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, rest = _split(name)
        fused = next((row for row in _FUSED if rest.startswith(row[0])), None)
        if fused is not None:
            kind, parts = rest.removeprefix(fused[0]), fused[column]
            out.update({f"{prefix}{part}{kind}": x for part, x in zip(parts, tensor.chunk(len(parts)))})
            continue
        row = next(r for r in (_BLOCK_NAMES if prefix else _NAMES) if rest.startswith(r[0]))
        if rest in ("table", "final_table"):
            tensor = tensor[None]
        elif name == "patch_embed.weight":
            tensor = tensor.unflatten(1, (-1, 1, 2, 2))
        out[prefix + row[column] + rest.removeprefix(row[0])] = tensor
    return out


def _to_ours(tensors: dict[str, Tensor], column: int) -> dict[str, Tensor]:
    """Names and shapes of ours; tensors of names that are not known keep them, to be refused by name."""
    ours: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        prefix, rest = _split(name)
        part = next(((r[0], i, p) for r in _FUSED for i, p in enumerate(r[column]) if rest.startswith(p)), None)
        if part is not None:
            fused.setdefault(prefix + part[0] + rest.removeprefix(part[2]), {})[part[1]] = tensor
            continue
        table = _BLOCK_NAMES if prefix else _NAMES
        row = next((r for r in table if rest.startswith(r[column])), None)
        new = name if row is None else prefix + row[0] + rest.removeprefix(row[column])
        if new.endswith("table") and tensor.dim() == 3:
            tensor = tensor[0]
        ours[new] = tensor.flatten(1) if new == "patch_embed.weight" else tensor
    for name, parts in fused.items():
        whole = next(len(r[column]) for r in _FUSED if r[0] in name)
        if len(parts) == whole:
            ours[name] = torch.cat([parts[i] for i in range(whole)])
    return ours


def _split(name: str) -> tuple[str, str]:
    """A block's prefix, "blocks.3." or none, and the rest of a tensor's name."""
    if not name.startswith("blocks."):
        return "", name
    _, number, rest = name.split(".", 2)
    return f"blocks.{number}.", rest


def _arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments from the shapes of tensors in our names. ValueError where one cannot be told."""
    try:
        width, patch = tensors["patch_embed.weight"].shape
        numbers = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
        return {
            "in_channels": patch // 4,
            "width": width,
            "layers": 1 + max(numbers),
            "ffn_width": tensors["blocks.0.ffn.0.weight"].shape[0],
            "text_width": tensors["text_proj.0.weight"].shape[1],
        }
    except (KeyError, ValueError) as error:
        raise ValueError(f"these are no Wan 2.1 T2V weights: {error} is missing") from error


# Reading: by the class name in config.json, None for a file without one.
ADAPTERS = {"CausalVideo": own, "WanTransformer3DModel": from_diffusers, None: from_original}
# Writing: class name for config.json, beginning of the file's name, translation.
EXPORTS = {
    "vgr": ("CausalVideo", "model", own),
    "diffusers": ("WanTransformer3DModel", "diffusion_pytorch_model", to_diffusers),
    "original": (None, "diffusion_pytorch_model", to_original),
}
