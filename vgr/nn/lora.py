"""Low-rank adapters on a frozen model's linear layers (arXiv 2106.09685), under PEFT's names, and their export to PEFT.

A target names linear layers as PEFT does, by the end of their name: `proj` is every `*.proj`, `attn.proj` some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _PEFT = "lora_A.weight", "lora_B.weight", "base_model.model."


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank B A x (eq. 3); W and b are the base layer's own, names included. B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(input))


def add(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freeze `model` and put trainable adapters, without effect yet, on the linear layers that `targets` name.

    ValueError for a rank below 1, and for targets that name no linear layer, with the list of those that do.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {t: [name for name in linear if name == t or name.endswith(f".{t}")] for t in targets}
    unknown = [t for t, names in chosen.items() if not names]
    if unknown or not chosen:
        # blocks.3.attn.qkv is told as qkv, t_embedder.2 as it is
        ends = {name if name[-1].isdigit() else name.rsplit(".", 1)[-1] for name in linear}
        raise ValueError(f"lora.targets: {', '.join(unknown) or 'none given'}; choose from {', '.join(sorted(ends))}")
    if not isinstance(rank, int) or rank < 1 or not alpha > 0:
        raise ValueError(f"lora.rank={rank}, lora.alpha={alpha}: rank must be an integer above 0, alpha above 0")
    model.requires_grad_(False)
    for name in dict.fromkeys(name for names in chosen.values() for name in names):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoRALinear(linear[name], rank, alpha))


def merge(base: dict[str, Tensor], adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The base's tensors with W + scale B A, in fp32, for every adapted W; the others as they are.

    Adapters under the names a LoRALinear gives them, of layers that `base` has.
    """
    merged = dict(base)
    for name in (n.removesuffix(_A) for n in adapters if n.endswith(_A)):
        low_rank = adapters[name + _B].float() @ adapters[name + _A].float()
        merged[f"{name}weight"] = torch.add(base[f"{name}weight"].float(), low_rank, alpha=scale)
    return merged


def to_peft(
    adapters: dict[str, Tensor], base: str, rank: int, alpha: float, targets: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors, as `peft.PeftModel.from_pretrained` reads them.

    adapters: by their names in the model; base: where the weights under them lie.
    """
    config = {
        "peft_type": "LORA", "task_type": None, "inference_mode": True, "base_model_name_or_path": base,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": list(targets),
    }  # fmt: skip
    return config, {_PEFT + name: tensor for name, tensor in adapters.items()}
