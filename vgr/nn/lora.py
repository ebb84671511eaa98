"""Low-rank adapters on a frozen model's linear layers (arXiv 2106.09685), under PEFT's names, and their export to PEFT.

A target names linear layers as PEFT does, by the end of their name: `proj` is every `*.proj`, `attn.proj` some of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_A, _B, _PEFT = "lora_A.weight", "lora_B.weight", "base_model.model."


class LoRALinear(nn.Linear):
    """y = W x + b + alpha / rank B A x (eq. 3); W and b are the base layer's own, names included. B starts at zero."""

    active = True

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        device = None if base.weight.is_meta else base.weight.device  # adapters are made, whenever their base is filled
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)  # of a base in bfloat16, under adapters in fp32
        if not self.active:
            return out
        return out + (self.scale * self.lora_B(self.lora_A(input.to(self.lora_A.weight.dtype)))).to(out.dtype)


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


@contextlib.contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is its frozen base, bit by bit."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear) and module.active]
    try:
        for module in adapters:
            module.active = False
        yield
    finally:
        for module in adapters:
            module.active = True


def merge(base: dict[str, Tensor], adapters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The base's tensors with W + scale B A, in fp32, for every adapted W; the others as they are.

    adapters: under the names a LoRALinear gives them. ValueError where the base has no such layer, or another size.
    """
    merged = dict(base)
    sizes = {name: tuple(tensor.shape) for name, tensor in (base | adapters).items()}
    for name in sorted({n.removesuffix(_A).removesuffix(_B) for n in adapters}):
        weight, up, down = (sizes.get(name + end, ()) for end in ("weight", _B, _A))
        if not len(weight) == len(up) == len(down) == 2 or weight != (up[0], down[1]) or up[1] != down[0]:
            raise ValueError(f"adapter {name}lora_* of sizes A {down}, B {up} fits no weight of the base ({weight})")
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


def from_peft(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The inverse: adapters by their names in the model, and their scale.

    Raises ValueError for adapters of another kind than `to_peft` writes, naming what is different.
    """
    plain = {"peft_type": "LORA", "bias": "none"}
    other = [f"{k}={config.get(k)}" for k, v in plain.items() if config.get(k) != v]
    unknown = ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern")
    other += [f"{k}={config[k]}" for k in (*unknown, "modules_to_save") if config.get(k)]
    other += [n for n in tensors if not n.startswith(_PEFT) or not n.endswith((_A, _B))][:3]
    if other or not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(f"only plain LoRA adapters of linear layers can be read, not {', '.join(other) or config}")
    return {n.removeprefix(_PEFT): t for n, t in tensors.items()}, config["lora_alpha"] / config["r"]
