"""Convolutions over frames that respect chunks: the past is global, the future ends with the chunk (spec 3.8).

A call may hold one chunk or several, and may be preceded by remembered frames; x is (B,T,S,D) throughout.
`chunks` are the sizes of the call's chunks in order, `before` the frames that stand before the call, None for none.
With a `shard` x holds this rank's frames of the call, `chunks` are still the whole call's and `before` is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from vgr.types import Shard


def _same_chunk(chunks: Sequence[int], distance: int, device: torch.device) -> Tensor:
    """(T-distance,1,1) bool: whether frames t and t + distance share a chunk."""
    owner = torch.arange(len(chunks)).repeat_interleave(torch.tensor(chunks))
    return (owner[distance:] == owner[:-distance]).view(-1, 1, 1).to(device, non_blocking=True)


def part(chunks: Sequence[int], a: int, b: int) -> list[int]:
    """Sizes of what chunks have of frames a to b, in order, without those that have nothing."""
    inside = (min(end, b) - max(end - n, a) for end, n in zip(accumulate(chunks), chunks))
    return [n for n in inside if n > 0]


def _with_halo(
    fn: Callable[[Tensor, list[int]], Tensor], x: Tensor, reach: int, chunks: Sequence[int], shard: Shard
) -> Tensor:
    """fn(frames, chunks) over this rank's frames and `reach` more on both sides, cut back to its own (spec 5.4)."""
    total = sum(chunks)
    a, b = shard.frames(total)
    start = max(a - reach, 0)
    wide = fn(shard.halo(x, reach, total), part(chunks, start, min(b + reach, total)))
    return wide[:, a - start : b - start]


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def symmetric_filter(
    x: Tensor,
    taps: Tensor,
    chunks: Sequence[int],
    before: Tensor | None = None,
    isolated: bool = False,
    shard: Shard | None = None,
) -> Tensor:
    """Depthwise filter: causal plus anti-causal with shared taps, centre counted once, the future cut at chunk ends.

    taps (D,1,R+1), the last one the current frame's. before (B,R,S,D): the causal side's past. isolated: the causal
    side stays inside the chunk as well (the released streaming model's camera branch, spec 12.9).
    """
    reach = taps.shape[-1] - 1
    if shard is not None:
        return _with_halo(lambda y, sizes: symmetric_filter(y, taps, sizes, None, isolated), x, reach, chunks, shard)
    taps = taps.to(x.dtype)
    if len(chunks) == 1:
        kernel = torch.cat([taps, taps.flip(-1)[..., 1:]], dim=-1).unsqueeze(-1)
        if before is None or isolated:
            out = F.conv2d(_channels_first(x), kernel, padding=(reach, 0), groups=x.shape[-1])
        else:
            padded = torch.cat([before.to(x.dtype), x, x.new_zeros(before.shape)], dim=1)
            out = F.conv2d(_channels_first(padded), kernel, groups=x.shape[-1])
        return out.permute(0, 2, 3, 1)
    if isolated:
        before = None
    past = x if before is None else torch.cat([before.to(x.dtype), x], dim=1)
    extra = past.shape[1] - x.shape[1]
    out = x * taps[:, 0, -1]
    for j in range(1, min(reach, past.shape[1] - 1) + 1):
        tap = taps[:, 0, -1 - j]
        earlier = past[:, max(extra - j, 0) : past.shape[1] - j] * tap
        if j < x.shape[1]:
            inside = _same_chunk(chunks, j, x.device).to(x.dtype)
            out = out + F.pad(x[:, j:] * inside * tap, (0, 0, 0, 0, 0, j))
            earlier = earlier * inside if isolated else earlier
        out = out + F.pad(earlier, (0, 0, 0, 0, x.shape[1] - earlier.shape[1], 0))
    return out


def mix_frames(
    x: Tensor, weight: Tensor, chunks: Sequence[int], before: Tensor | None = None, shard: Shard | None = None
) -> Tensor:
    """Dense three-tap convolution over frames, weight (D,D,3,1): left neighbour always, right one inside the chunk.

    before (B,1,S,D): the frame before the call, zero when None.
    """
    if shard is not None:
        return _with_halo(lambda y, sizes: mix_frames(y, weight, sizes), x, 1, chunks, shard)
    if len(chunks) == 1 and before is None:
        return F.conv2d(_channels_first(x), weight, padding=(1, 0)).permute(0, 2, 3, 1)
    edge = torch.zeros_like(x[:, :1])
    padded = torch.cat([edge if before is None else before.to(x.dtype), x, edge], dim=1)
    if len(chunks) == 1:
        return F.conv2d(_channels_first(padded), weight).permute(0, 2, 3, 1)
    out = F.conv2d(_channels_first(padded[:, :-1]), weight[:, :, :2]).permute(0, 2, 3, 1)
    following = F.linear(x[:, 1:], weight[:, :, 2, 0]) * _same_chunk(chunks, 1, x.device).to(out.dtype)
    return out + F.pad(following, (0, 0, 0, 0, 0, 1))
