"""Context parallelism: the latent frames of one call split over the ranks of a process group (spec 5.4).

Only all-gather, reduce-scatter and all-to-all are used, alike on gloo and NCCL. All ranks of the group call the same
operations in the same order, backward as well as forward; gradients are those of the sum of the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from vgr.types import Conditioning, Shard


def _padded(x: Tensor, length: int) -> Tensor:
    """Zeros after the first axis; collectives want ranks of equal shape."""
    return x if x.shape[0] == length else F.pad(x, (0, 0) * (x.dim() - 1) + (0, length - x.shape[0]))


class _Gather(torch.autograd.Function):
    """The ranks' tensors joined along the first axis, of known lengths; the gradient is summed over its readers."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, lengths: Sequence[int], rank: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.lengths, ctx.rank, ctx.group = lengths, rank, group
        most = max(lengths)
        out = x.new_empty(most * len(lengths), *x.shape[1:])
        dist.all_gather_into_tensor(out, _padded(x, most).contiguous(), group=group)
        return out if min(lengths) == most else torch.cat([y[:n] for y, n in zip(out.split(most), lengths)])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        most = max(ctx.lengths)
        if min(ctx.lengths) < most:
            grad = torch.cat([_padded(y, most) for y in grad.split(ctx.lengths)])
        own = grad.new_empty(most, *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own[: ctx.lengths[ctx.rank]], None, None, None


class _Exchange(torch.autograd.Function):
    """Pieces of the first axis to every rank, theirs in return; gradients go back the same way."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = list(send), list(receive), group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), ctx.receive, ctx.send, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.send), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))


class ContextShard:
    """`vgr.types.Shard` over a process group, None for the world; slices differ by one frame at most, no padding."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def frames(self, total: int, rank: int | None = None) -> tuple[int, int]:
        rank = self.rank if rank is None else rank
        return total * rank // self.size, total * (rank + 1) // self.size

    def all_gather(self, x: Tensor, dim: int = 0, total: int | None = None) -> Tensor:
        lengths = [x.shape[dim]] * self.size
        if total is not None:
            lengths = [b - a for a, b in (self.frames(total, r) for r in range(self.size))]
        return _Gather.apply(x.movedim(dim, 0), lengths, self.rank, self.group).movedim(0, dim)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return _Exchange.apply(x, send, receive, self.group)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_gather(x.unsqueeze(0)).sum(0)

    def halo(self, x: Tensor, reach: int, total: int) -> Tensor:
        spans = [self.frames(total, r) for r in range(self.size)]
        wide = [(max(a - reach, 0), min(b + reach, total)) for a, b in spans]
        own = spans[self.rank]
        wanted = [(0, 0) if r == self.rank else _overlap(own, w) for r, w in enumerate(wide)]
        coming = [(0, 0) if r == self.rank else _overlap(s, wide[self.rank]) for r, s in enumerate(spans)]
        send, receive = ([b - a for a, b in pieces] for pieces in (wanted, coming))
        pieces = torch.cat([x[:, max(a - own[0], 0) :][:, :n] for (a, _), n in zip(wanted, send)], dim=1)
        # Empty pieces are joined too: without them a rank would miss the exchange of the backward pass.
        came = [y.movedim(0, 1) for y in self.all_to_all(pieces.movedim(1, 0), send, receive).split(receive)]
        return torch.cat([*came[: self.rank], x, *came[self.rank + 1 :]], dim=1)

    def prefix(self, c: Tensor, h: Tensor, reverse: bool = False) -> Tensor:
        maps = self.all_gather(torch.cat([c, h], dim=-1).unsqueeze(0))
        # A sum over no rank is zero but in the graph, so that all ranks join the exchange of the backward pass.
        state = maps[:0, ..., c.shape[-1] :].sum(0)
        for r in range(self.size - 1, self.rank, -1) if reverse else range(self.rank):
            step, add = maps[r].split([c.shape[-1], h.shape[-1]], dim=-1)
            state = torch.baddbmm(add, step, state)
        return state


def split_calls(network: nn.Module, shard: Shard) -> None:
    """From now on every rank of the shard gives `network` the same whole calls and gets whole velocities.

    Inside, each rank computes its share: heads (`shards_frames` False), or frames. Of a model whose ranks hold frames a
    call with a state is made whole by each of them. Gradients of parameters are shares too: their sum over the ranks,
    each of which has the loss of the whole, is `shard.size` times that of one rank, their mean is that of one rank.
    """
    whole = network.forward

    def forward(
        x: Tensor, t: Tensor, cond: Conditioning, state: Any = None, *, commit: bool = False
    ) -> tuple[Tensor, Any]:
        if not network.shards_frames:
            return whole(x, t, cond, state, commit=commit, shard=shard)
        if state is not None or commit:
            return whole(x, t, cond, state, commit=commit)
        a, b = shard.frames(frames := x.shape[2])
        v, state = whole(x[:, :, a:b], t[:, a:b], cond.frames(a, b), shard=shard)
        return shard.all_gather(v, 2, frames), state

    network.forward = forward
