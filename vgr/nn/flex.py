"""Attention under a mask of frames in one fused product that skips blocks in which nothing is read (FlexAttention).

A packed call of 61 latent frames of 1,560 tokens has a token mask of 36 GB. Its mask of frames has 15 KB, and the
blocks that the kernels walk are found from that alone, 35 MB of indices. Chunk by chunk there is no mask either, but
what each chunk reads is copied, under full history 12 GB of keys and values a layer (width 1536, bf16).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # symbolic shapes come with it, which streaming need not import
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # tokens of a block, along queries and along keys


def frame_mask(seen: Tensor, cells: int) -> BlockMask:
    """Tokens of query frame i read those of key frame j where seen (B,Tq,Tk) bool is true; `cells` tokens a frame."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = []
    for tokens in (frames * cells for frames in seen.shape[1:]):
        starts = torch.arange(0, tokens, BLOCK, device=seen.device)
        ends = (starts + BLOCK).clamp(max=tokens)
        blocks.append((starts // cells, (ends - 1) // cells + 1, ends - starts == BLOCK))
    (first_q, end_q, whole_q), (first_k, end_k, whole_k) = blocks
    # Frame pairs that are read inside a block, from sums over all pairs before each.
    sums = F.pad(seen.int().cumsum(1).cumsum(2), (1, 0, 1, 0))
    rows = sums[:, end_q] - sums[:, first_q]
    count = rows[:, :, end_k] - rows[:, :, first_k]
    full = (count == (end_q - first_q)[:, None] * (end_k - first_k)) & whole_q[:, None] & whole_k

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    def reads(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return seen[b, q // cells, k // cells]

    lists, lengths = (*listed((count > 0) & ~full), *listed(full)), (seen.shape[1] * cells, seen.shape[2] * cells)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=reads, seq_lengths=lengths)


@cache
def _product(fused: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if fused else flex_attention


def frame_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """q (B,Tq,S,N,K), k and v (B,Tk,S,N,K) to q's shape; on a CPU by all scores, with ValueError for a gradient."""
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    try:
        out = _product(q.is_cuda)(*flat, block_mask=mask)
    except NotImplementedError as error:
        raise ValueError(f"model.attention_backend=flex has no backward pass on {q.device}: use torch") from error
    return out.transpose(1, 2).unflatten(1, q.shape[1:3])
