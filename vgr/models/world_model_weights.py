"""The world model's weights in other people's names and shapes, translated in one place (spec 10.2).

The released files (bidirectional, chunk-causal, streaming) and diffusers' folders hold tensors that no output depends
on. They are kept under `unused.<their name>`, so that an export has the keys, and the bits, of what was read.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from vgr.models.weights import UNUSED
from vgr.nn.attention import OPEN_GATE

logger = logging.getLogger(__name__)

# Where releases keep the stage-1 model, and what to fetch of a repository that also holds 90 GB of other parts.
INSIDE = ("dit", "sana_dit", "transformer")
PATTERNS = ("config.json", "model*", "diffusion_pytorch_model*", *(f"{name}/*" for name in INSIDE))
HOW_TO_GET = (
    "Released weights: `hf download Efficient-Large-Model/SANA-WM_bidirectional dit/sana_wm_1600m_720p.safetensors` "
    "(10.7 GB, Apache-2.0 by its model card), or SANA-WM_chunk_causal, SANA-WM_streaming (licences on their cards)"
)
# The released model's doubtful points (spec 3.7, 4.2, 12.1), and what diffusers' port does instead.
RELEASED = {"cam_renorm_softmax": True, "cam_renorm_gdn": False, "softmax_bf16": True, "truncate_times": True}
PORT = {**RELEASED, "cam_renorm_gdn": True}
# Beginnings of names, released and ours, at the top or inside a block; the first that fits counts.
_NAMES = (
    ("x_embedder.proj.", "x_embedder."),
    ("plucker_embedder.proj.", "plucker_embedder."),
    ("t_embedder.mlp.", "t_embedder."),
    ("t_block.1.", "t_block."),
    ("y_embedder.y_proj.fc1.", "y_proj.0."),
    ("y_embedder.y_proj.fc2.", "y_proj.2."),
    ("final_layer.linear.", "final_linear."),
    ("final_layer.scale_shift_table", "final_table"),
    ("mlp.inverted_conv.conv.", "mlp.expand."),
    ("mlp.depth_conv.conv.", "mlp.depthwise."),
    ("mlp.point_conv.conv.", "mlp.project."),
    ("mlp.t_conv.", "mlp.temporal."),
    ("attn.conv_k_cam.weight", "attn.conv_k_cam"),
    ("attn.conv_k.weight", "attn.conv_k"),
)
_PORT_NAMES = (("t_embedder.mlp.0.", "t_embedder.linear_1."), ("t_embedder.mlp.2.", "t_embedder.linear_2."))
# Beginnings of diffusers' names of SANA-Video, which the world model grew from, and ours (spec 5.3).
_SANA_VIDEO = (
    ("patch_embedding.", "x_embedder."),
    ("time_embed.emb.timestep_embedder.linear_1.", "t_embedder.0."),
    ("time_embed.emb.timestep_embedder.linear_2.", "t_embedder.2."),
    ("time_embed.linear.", "t_block."),
    ("caption_projection.linear_1.", "y_proj.0."),
    ("caption_projection.linear_2.", "y_proj.2."),
    ("caption_norm.", "attention_y_norm."),
    ("proj_out.", "final_linear."),
    ("attn1.norm_q.", "attn.q_norm."),
    ("attn1.norm_k.", "attn.k_norm."),
    ("attn1.to_out.0.", "attn.proj."),
    ("attn2.norm_q.", "cross_attn.q_norm."),
    ("attn2.norm_k.", "cross_attn.k_norm."),
    ("attn2.to_q.", "cross_attn.q_linear."),
    ("attn2.to_out.0.", "cross_attn.proj."),
    ("ff.conv_inverted.", "mlp.expand."),
    ("ff.conv_depth.", "mlp.depthwise."),
    ("ff.conv_point.", "mlp.project."),
    ("ff.conv_temp.", "mlp.temporal."),
)
# Linear layers of ours that are convolutions with a kernel of one there: how many axes those add.
_KERNELS = {"x_embedder.weight": 3, "plucker_embedder.weight": 3, "mlp.expand.weight": 2, "mlp.project.weight": 2}
# Without effect on the output, and why; those of _GATES in softmax blocks only.
_UNUSED = {
    "pos_embed": "positions are rotary",
    "y_embedder.y_embedding": "empty prompts go through the text encoder",
    "raymap_embedder.": "the Pluecker branch took its place",
    "attn.recall_gate": "no equation reads it",
}
_GATES = {f"attn.{name}": "softmax blocks have no gates" for name in ("A_log", "dt_bias", "beta_proj.", "gate_proj.")}
_WRAPPERS = {"model", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}


def own(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return config, tensors


def from_diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A diffusers configuration and its tensors in our names and shapes."""
    ours, tensors = from_original({}, {_swap(k, _PORT_NAMES, back=True): v for k, v in tensors.items()})
    if config.get("num_attention_heads", ours["heads"]) != ours["heads"]:
        raise ValueError(f"self-attention has {ours['heads']} heads, cross-attention {config['num_attention_heads']}")
    return {**ours, **PORT}, tensors


def from_original(_config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A released file's tensors in our names and shapes, and the constructor arguments that its shapes tell."""
    plain = {".".join(p for p in name.split(".") if p not in _WRAPPERS): t for name, t in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError("some tensors are there twice, with and without a wrapper's prefix (model., module.)")
    ours = {_swap(name, _NAMES): tensor for name, tensor in plain.items()}
    numbers = [int(name.split(".")[1]) for name in ours if name.startswith("blocks.")]
    softmax = [i for i in sorted(set(numbers)) if f"blocks.{i}.attn.conv_k" not in ours]
    for name in list(ours):
        block, rest = _block(name)
        gates = _GATES if block and int(block.split(".")[1]) in softmax else {}
        if _start(rest, _UNUSED | gates):
            ours[UNUSED + name] = ours.pop(name)
        elif rest in _KERNELS and ours[name].dim() > 2:
            ours[name] = ours[name].flatten(1)
    for i in set(numbers):
        for kind in ("weight", "bias"):
            names = [f"blocks.{i}.attn.{p}_proj_cam.{kind}" for p in "qkv"]
            if ours.keys() >= set(names):
                ours[f"blocks.{i}.attn.qkv_cam.{kind}"] = torch.cat([ours.pop(name) for name in names])
    config = _arguments(ours, 1 + max(numbers, default=-1), softmax)
    reasons = _UNUSED | _GATES
    kept = Counter(_start(_block(name.removeprefix(UNUSED))[1], reasons) for name in ours if name.startswith(UNUSED))
    told = ", ".join(f"{count} {start.rstrip('.')} ({reasons[start]})" for start, count in kept.items())
    logger.info("tensors without effect on the output: %s", told or "none")
    return {**config, **RELEASED}, ours


def _arguments(tensors: dict[str, Tensor], layers: int, softmax: list[int]) -> dict[str, Any]:
    """Constructor arguments from the shapes of tensors in our names."""
    every = softmax[0] + 1 if softmax else layers + 1
    if softmax != list(range(every - 1, layers, every)):
        raise ValueError(f"attn.conv_k is missing in blocks {softmax}; it may be in every n-th (softmax) only")
    try:
        gates = next((t for k, t in tensors.items() if k.endswith("attn.A_log")), None)
        taps = next((t for k, t in tensors.items() if k.endswith("attn.conv_k")), None)
        if gates is None:
            raise ValueError("the number of heads cannot be told: no block has attn.A_log")
        return {
            **_sizes(tensors, layers),
            "heads": len(gates),
            "softmax_every": every,
            "raw_frames": tensors["plucker_embedder.weight"].shape[1] // 6,
            "conv_kernel": 4 if taps is None else taps.shape[-1],
        }
    except KeyError as error:
        raise ValueError(f"these are not a world model's weights, {error} is missing") from error


def _sizes(tensors: dict[str, Tensor], layers: int) -> dict[str, Any]:
    width, channels = tensors["x_embedder.weight"].shape
    hidden = tensors["blocks.0.mlp.depthwise.weight"].shape[0] // 2
    ratios = (hidden / width, math.nextafter(hidden / width, math.inf))  # int(width * ratio) must be hidden
    return {
        "in_channels": channels,
        "width": width,
        "layers": layers,
        "mlp_ratio": next(r for r in ratios if int(width * r) == hidden),
        "text_width": tensors["y_proj.0.weight"].shape[1],
    }


def from_sana_video(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A diffusers SANA-Video folder as the linear-attention model that the world model starts from (spec 5.3).

    Its patches of 1 x p x p cells come as p*p*C channels, pixel by pixel. Output gates, which it has not, are open.
    The camera branch is not there: surgery=[camera] or from_pretrained(partial=True) starts it.
    """
    heads = config["num_attention_heads"]
    patch, cross = config.get("patch_size", (1, 2, 2)), config.get("num_cross_attention_heads", heads)
    if patch[0] != 1 or cross != heads or config.get("guidance_embeds"):
        raise ValueError(
            f"patches of {patch[0]} frames, {cross} text heads beside {heads} or guidance_embeds="
            f"{config.get('guidance_embeds')}: of SANA-Video's forms 1 frame, equal heads and no guidance can be read"
        )
    ours = {_swap(k.removeprefix("transformer_"), _SANA_VIDEO): v for k, v in tensors.items()}
    numbers = [int(name.split(".")[1]) for name in ours if name.startswith("blocks.")]
    try:
        ours["final_table"] = ours.pop("scale_shift_table")
        embed = ours["x_embedder.weight"]
        ours["x_embedder.weight"] = embed.permute(0, 2, 3, 4, 1)
        for i in sorted(set(numbers)):
            b = f"blocks.{i}."
            joined = {"attn.qkv.weight": [f"attn1.to_{p}.weight" for p in "qkv"]}
            joined |= {f"cross_attn.kv_linear.{x}": [f"attn2.to_{p}.{x}" for p in "kv"] for x in ("weight", "bias")}
            for name, parts in joined.items():
                ours[b + name] = torch.cat([ours.pop(b + part) for part in parts])
            ours[f"{b}attn.output_gate.weight"] = embed.new_zeros(len(embed), len(embed))
            ours[f"{b}attn.output_gate.bias"] = embed.new_full((len(embed),), OPEN_GATE)
        for name in ours:
            if _block(name)[1] in _KERNELS:
                ours[name] = ours[name].flatten(1)
        sizes = _sizes(ours, 1 + max(numbers, default=-1))
    except KeyError as error:
        raise ValueError(f"these are not SANA-Video's weights, {error} is missing") from error
    return {**sizes, "heads": heads, "mixer": "linear", "softmax_every": 0}, ours


def to_original(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our tensors under the released file's keys (872 at 20 layers), which has no configuration.

    Tensors without effect are those once read, else what a training starts with (spec 3.2): gates open, beta 0.993,
    and zeros for the ray map, the null prompt (300,text_width) and pos_embed. The latter's shape (1,484,D), 22x22
    cells of a 720-pixel image, is a guess: loaders drop it.
    """
    if wrong := [f"{k}={config[k]}" for k, v in (("cameras", "both"), ("key_scale", "frame")) if config.get(k, v) != v]:
        raise ValueError(f"the released model knows no {' and no '.join(wrong)}: export it in our own form")
    like, width, heads = tensors["x_embedder.weight"], config["width"], config["heads"]
    made = {
        "pos_embed": like.new_zeros(1, 484, width),
        "y_embedder.y_embedding": like.new_zeros(300, config["text_width"]),
        "raymap_embedder.proj.weight": like.new_zeros(width, 3, 1, 1, 1),
        "raymap_embedder.proj.bias": like.new_zeros(width),
    }
    for i in range(config["layers"]):
        made[f"blocks.{i}.attn.recall_gate"] = like.new_zeros(1)
        if config["softmax_every"] and (i + 1) % config["softmax_every"] == 0:
            for name, start in (("A_log", 0.0), ("dt_bias", -5.0), ("beta_proj.bias", 5.0), ("gate_proj.bias", 0.0)):
                made[f"blocks.{i}.attn.{name}"] = like.new_full((heads,), start)
            for name in ("beta_proj", "gate_proj"):
                made[f"blocks.{i}.attn.{name}.weight"] = like.new_zeros(heads, width)
    for name, tensor in tensors.items():
        if name.startswith(UNUSED):
            made[name.removeprefix(UNUSED)] = tensor
        elif "qkv_cam" in name:
            made |= {name.replace("qkv_cam", f"{p}_proj_cam"): t for p, t in zip("qkv", tensor.chunk(3))}
        else:
            axes = _KERNELS.get(_block(name)[1], 0)
            made[_swap(name, _NAMES, back=True)] = tensor[(...,) + (None,) * axes]
    return {}, made


def to_diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors of diffusers' SanaWMTransformer3DModel."""
    theirs = {_swap(k, _PORT_NAMES): v for k, v in to_original(config, tensors)[1].items()}
    for name in ("pos_embed", "y_embedder.y_embedding"):
        theirs.pop(name)
    return {
        "in_channels": config["in_channels"],
        "hidden_size": config["width"],
        "num_attention_heads": config["heads"],
        "linear_head_dim": config["width"] // config["heads"],
        "num_layers": config["layers"],
        "softmax_every_n": config["softmax_every"],
        "mlp_ratio": config["mlp_ratio"],
        "caption_channels": config["text_width"],
        "chunk_plucker_channels": 6 * config["raw_frames"],
        "chunk_plucker_post_attn_blocks": config["layers"],
        "conv_kernel_size": config["conv_kernel"],
    }, theirs


def _block(name: str) -> tuple[str, str]:
    """`blocks.3.` and the rest, or an empty string and the name."""
    parts = name.split(".", 2)
    return (f"blocks.{parts[1]}.", parts[2]) if parts[0] == "blocks" and len(parts) == 3 else ("", name)


def _swap(name: str, pairs: tuple[tuple[str, str], ...], back: bool = False) -> str:
    block, rest = _block(name)
    for old, new in (pair[::-1] for pair in pairs) if back else pairs:
        if rest.startswith(old):
            return block + new + rest.removeprefix(old)
    return name


def _start(rest: str, starts: dict[str, str]) -> str | None:
    return next((start for start in starts if rest.startswith(start)), None)


# Reading: by the class name in config.json, None for a file or folder without one.
ADAPTERS = {
    "WorldModel": own,
    "SanaWMTransformer3DModel": from_diffusers,
    "SanaVideoTransformer3DModel": from_sana_video,
    None: from_original,
}
# Writing: class name for config.json, beginning of the file's name, translation.
EXPORTS = {
    "vgr": ("WorldModel", "model", own),
    "diffusers": ("SanaWMTransformer3DModel", "diffusion_pytorch_model", to_diffusers),
    "original": (None, "model", to_original),
}
