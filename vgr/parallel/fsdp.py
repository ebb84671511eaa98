"""FSDP2: parameters, and what is made of them, split over ranks, block by block (design 4).

Numbers stay those of one rank: parameters are gathered in their own precision, what is reduced is the mean over all
ranks, and forward inputs are not cast (times, cameras and gates are fp32).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost module lists' modules: what is gathered for its own call and let go after it."""
    for child in network.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def shard_network(network: nn.Module, mesh: DeviceMesh, by_block: bool = True) -> None:
    """Split a network's parameters over `mesh`, one axis, or (replicas, shards) for hybrid sharding.

    by_block: each block by itself; else, and for what lies outside of blocks, at once. It is then called through its
    forward alone. On the meta device it stays there; give it memory, then `fill` it.
    """
    for part in (*(blocks(network) if by_block else ()), network):
        # Also the outermost part: of calls without gradients no backward pass would split it again.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Copy whole tensors of these names, alike on every rank, into a network; a split one takes its own part only.

    Raises KeyError for a tensor that is missing.
    """
    there = network.state_dict()
    for name in names:
        own, given = there[name], tensors[name]
        if isinstance(own, DTensor):
            given = distribute_tensor(given.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
        own.copy_(given)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a split tensor (DeepSpeed's too), or the tensor: for what is done element by element."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_shape(tensor: Tensor) -> torch.Size:
    """Shape of a tensor; DeepSpeed's ZeRO-3 leaves a split one empty between its uses."""
    return getattr(tensor, "ds_shape", tensor.shape)
