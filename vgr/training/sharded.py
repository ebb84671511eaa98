"""`trainer.strategy=fsdp`: all networks of a training module split over ranks (FSDP2), clips too if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from vgr.parallel import fsdp
from vgr.parallel.context import ContextShard, split_calls


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks, or over groups of them that each hold the whole.

    replicas: groups of ranks that each hold all parameters (hybrid sharding: one a node); context: neighbouring ranks
    that share every clip, by frames or heads, as `vgr.parallel.context`. Both divide the ranks, and context the ranks
    of a replica.
    """

    def __init__(self, replicas: int, context: int) -> None:
        super().__init__(tensor_parallel_size=context)
        self.replicas, self.context = replicas, context

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size // self.context
        super().setup_environment()

    def split(self, module: pl.LightningModule) -> None:
        """Split every network of a training module; called by its `configure_model`, once.

        What is on the meta device gets memory: each rank takes its part of `module.initial` by the network's name, a
        tensor at a time; without one a checkpoint is about to fill it.
        """
        kind, world = self.root_device.type, self.world_size
        shape, names = ((world,), ("shard",)) if self.replicas == 1 else (
            (self.replicas, world // self.replicas), ("replicate", "shard")
        )  # fmt: skip
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        shard = None if self.context == 1 else ContextShard(self.device_mesh["tensor_parallel"].get_group())
        initial, module.initial = module.initial, {}
        for name, network in networks(module):
            waiting = [own for own, x in network.state_dict().items() if x.is_meta]
            if any(True for _ in network.parameters()):
                fsdp.shard_network(network, mesh, by_block=name != "judge")  # whose heads are not called as modules
            if waiting:
                network._apply(lambda x: torch.empty_like(x, device=self.root_device) if x.is_meta else x)
            if name in initial:
                fsdp.fill(network, initial[name], waiting)
            if shard is not None and hasattr(network, "shards_frames"):
                split_calls(network, shard)


def networks(module: pl.LightningModule) -> list[tuple[str, nn.Module]]:
    """Networks of a training module, its own and those it keeps in dictionaries, by name: `model`, `ema.model`."""
    found: dict[nn.Module, str] = {}
    for name, child in module.named_children():
        inside = [(f"{name}.{part}", x) for part, x in child.items()] if isinstance(child, nn.ModuleDict) else None
        for path, network in inside or [(name, child)]:
            found.setdefault(network, path)  # a text encoder that is never trained is its own average
    return [(name, network) for network, name in found.items()]


def clip_ranks(settings: Mapping[str, Any], cfg: Mapping[str, Any], model: type[nn.Module]) -> int:
    """Ranks that share a clip, of a trainer's settings and a model's class. ValueError for a layout that cannot be."""
    strategy, replicas, context = settings["strategy"], settings["replicas"], settings["context"]
    if strategy not in ("auto", "ddp", "fsdp", "zero2", "zero3"):
        raise ValueError(f"trainer.strategy={strategy}: choose auto, ddp, fsdp, zero2 or zero3")
    if strategy.startswith("zero"):
        refuse_unfit_zero(strategy, cfg)
    if strategy != "fsdp" and (replicas, context) != (1, 1):
        raise ValueError(f"fsdp.replicas={replicas}, fsdp.context={context} are for trainer.strategy=fsdp")
    world = settings["devices"] * settings["num_nodes"]
    if min(replicas, context) < 1 or world % replicas or (world // replicas) % context:
        raise ValueError(
            f"fsdp.replicas={replicas}, fsdp.context={context}: {world} ranks (devices x num_nodes) must be a "
            "multiple of replicas, and the ranks of a replica of context"
        )
    if strategy in ("fsdp", "zero3") and world > 1 and cfg["every"]["bench"]:
        raise ValueError(
            f"every.bench={cfg['every']['bench']}: ranks of a split model measure together, not a share each; set it "
            "to 0 and run vgr-bench on the finished run"
        )
    if context > 1 and not hasattr(model, "shards_frames"):
        raise ValueError(f"fsdp.context={context}: a {model.__name__} cannot share clips; set it to 1")
    if context > 1 and cfg["training"].get("judge") is not None:
        raise ValueError(f"fsdp.context={context}: training.judge sees whole clips; leave one of them out")
    return context


def refuse_unfit_zero(strategy: str, cfg: Mapping[str, Any]) -> None:
    """ValueError, naming the key, for what DeepSpeed's ZeRO cannot train."""
    if cfg["training"]["_target_"].endswith(".SelfForcing"):
        raise ValueError(
            f"trainer.strategy={strategy} trains one network with one optimizer, and self-forcing has two: use fsdp"
        )
    if strategy == "zero3" and cfg["compile"]:
        raise ValueError("compile=true: what zero3 hangs on a block to gather it would be compiled; use zero2 or fsdp")
    if strategy == "zero3" and cfg["lora"]["rank"]:
        raise ValueError(
            f"lora.rank={cfg['lora']['rank']}: zero3 splits networks that are trained whole, and adapters sit on a "
            "frozen one; use zero2 or fsdp"
        )


def split_networks(module: pl.LightningModule) -> None:
    """`LightningModule.configure_model` of all training modules: what the strategy says, once."""
    if split := getattr(strategy_of(module), "split", None):
        split(module)


def strategy_of(module: pl.LightningModule) -> Any:
    """What its trainer deals a module to ranks by; None before it has one."""
    return module._trainer and module._trainer.strategy


def is_split(strategy: Any) -> bool:
    """Whether ranks call networks together, since none of them holds one whole."""
    return isinstance(strategy, ShardedStrategy) or getattr(strategy, "stage", None) == 3


def gradients(module: pl.LightningModule) -> dict[str, Tensor]:
    """Gradients of a training module's parameters by name; of what DeepSpeed splits this rank's parts."""
    if own := getattr(strategy_of(module), "gradients", None):
        return own()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def gradient_norm(module: pl.LightningModule) -> Tensor:
    """Norm of all gradients of a training module, the same on all ranks."""
    norm, strategy = nn.utils.get_total_norm(gradients(module).values()), strategy_of(module)
    if hasattr(strategy, "gradients"):
        return strategy.reduce(norm.to(strategy.root_device).square(), reduce_op="sum").sqrt()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
