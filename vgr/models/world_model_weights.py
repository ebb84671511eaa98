"""The world model's weights in other people's names and shapes, translated in one place (spec 10.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def own(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return config, tensors


# diffusers' names that differ from ours; everything under blocks.* is handled by prefix.
_RENAMES = {
    "x_embedder.proj.": "x_embedder.",
    "plucker_embedder.proj.": "plucker_embedder.",
    "t_embedder.linear_1.": "t_embedder.0.",
    "t_embedder.linear_2.": "t_embedder.2.",
    "t_block.1.": "t_block.",
    "y_embedder.y_proj.fc1.": "y_proj.0.",
    "y_embedder.y_proj.fc2.": "y_proj.2.",
    "final_layer.linear.": "final_linear.",
    "final_layer.scale_shift_table": "final_table",
    "mlp.inverted_conv.conv.": "mlp.expand.",
    "mlp.depth_conv.conv.": "mlp.depthwise.",
    "mlp.point_conv.conv.": "mlp.project.",
    "mlp.t_conv.": "mlp.temporal.",
    "attn.conv_k.weight": "attn.conv_k",
    "attn.conv_k_cam.weight": "attn.conv_k_cam",
}
# In the released files but without effect on the output (spec 10.2).
_UNUSED = ("raymap_embedder.", "recall_gate", "pos_embed", "y_embedder.y_embedding")


def from_diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """diffusers' configuration and tensors in our names and shapes."""
    every = config["softmax_every_n"]
    ours = {
        "in_channels": config["in_channels"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "layers": config["num_layers"],
        "softmax_every": every,
        "mlp_ratio": config["mlp_ratio"],
        "text_width": config["caption_channels"],
        "raw_frames": config["chunk_plucker_channels"] // 6,
        "conv_kernel": config["conv_kernel_size"],
        "cam_renorm_softmax": True,
        "cam_renorm_gdn": True,
        "softmax_bf16": True,
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(part in name for part in _UNUSED):
            continue
        for theirs, mine in _RENAMES.items():
            name = name.replace(theirs, mine)
        parts = name.split(".")
        if parts[0] == "blocks":
            softmax = (int(parts[1]) + 1) % every == 0
            if softmax and any(p in parts for p in ("A_log", "dt_bias", "beta_proj", "gate_proj")):
                continue  # kept by the port in softmax blocks, without effect there
        renamed[name] = tensor
    for i in range(config["num_layers"]):
        for kind in ("weight", "bias"):
            rows = [renamed.pop(f"blocks.{i}.attn.{p}_proj_cam.{kind}") for p in "qkv"]
            renamed[f"blocks.{i}.attn.qkv_cam.{kind}"] = torch.cat(rows)
    return ours, {name: _reshape(name, tensor) for name, tensor in renamed.items()}


def _reshape(name: str, tensor: Tensor) -> Tensor:
    """1x1 convolutions as linear layers; the other convolutions keep their taps."""
    if name.endswith(("depthwise.weight", "temporal.weight", "conv_k", "conv_k_cam")):
        return tensor
    return tensor.flatten(1) if tensor.dim() > 2 else tensor


ADAPTERS = {"WorldModel": own, "SanaWMTransformer3DModel": from_diffusers}
