"""Attention of the causal video model: chunks of frames over themselves and what a memory policy lets them read.

Tokens are (B,T,S,D), frame-major and row-major inside a frame; heads (B,T,S,N,K). A call may hold every frame twice,
as clean context and as noisy target (packed teacher forcing, CausalCine spec 3.2): a chunk of either role reads the
clean frames before it and its own. Or the clean frames of the past come from a memory: both give equal outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgr.nn.flex import frame_attention, frame_mask
from vgr.nn.memory import Frame, Gathered, KeyValues, MemoryPolicy, route, take
from vgr.nn.norm import RMSNorm
from vgr.nn.rope import rope_table, rotate
from vgr.types import Layout, Shard

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Query:
    """A chunk of a call: where its frames stand in the call, targets before their context twins, and what it reads.

    always: pool indices of each sample, ascending; fixed (B,n), choices (M,): the same and what routing chooses from,
    on the device, where there is anything to choose; most: frames it reads at most, in any sample.
    """

    chunk: int
    spans: tuple[tuple[int, int], ...]
    always: list[list[int]]
    most: int
    fixed: Tensor | None = None
    choices: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What a call holds, known on the host.

    queries: its chunks; own: the stretch of its frames that joins the memory's in the pool of clean frames;
    table: rotations (T,S,K/2), of the call's frames if the policy `rotates_once`, else of positions 0, 1, ...;
    choices: what routing chose, (layer, chunk) to pool indices (B,routed). It is filled as layers run, so that later
    steps of a chunk, its commit, its context twin and a recomputed backward pass read what its first step read.
    mask: of all chunks in one fused product, see `seen_frames`; None: chunk by chunk.
    """

    queries: tuple[Query, ...]
    own: tuple[int, int]
    table: Tensor
    choices: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    mask: BlockMask | None = None


def plan_call(
    frames: list[tuple[Frame, int]], past: list[Frame], policy: MemoryPolicy, layout: Layout, grid: tuple[int, int],
    head_dim: int, choices: dict[tuple[int, int], Tensor], device: torch.device, fused: bool,
) -> Call:  # fmt: skip
    """What each chunk of a call reads. Clean frames are those of the memory and the call's context or own frames.

    frames: the call's, with roles; choices: what routing has chosen already; fused: several chunks get a mask.
    """
    roles = {r for _, r in frames}
    inside = [i for i, (_, r) in enumerate(frames) if r == max(roles)]
    pool = [*past, *(frames[i][0] for i in inside)]
    spans: dict[int, list[tuple[int, int]]] = {}
    for role in sorted(roles):
        for chunk in sorted({f.chunk for f, r in frames if r == role}):
            own = [i for i, (f, r) in enumerate(frames) if r == role and f.chunk == chunk]
            spans.setdefault(chunk, []).append((own[0], own[-1] + 1))
    queries = []
    for chunk, where in spans.items():
        always, others = policy.reads(pool, frames[where[0][0]][0])
        ready = [torch.tensor(x, dtype=torch.int64, device=device) for x in (always, others) if others]
        queries.append(Query(chunk, tuple(where), always, max(map(len, always)) + bool(others) * policy.routed, *ready))
    position = layout.position
    if not policy.rotates_once:
        position = torch.arange(max(q.most + q.spans[0][1] - q.spans[0][0] for q in queries), device=device)
    call = Call(tuple(queries), (inside[0], inside[-1] + 1), rope_table(position, *grid, head_dim), choices)
    if not fused or len(queries) == 1:
        return call
    seen = seen_frames(queries, inside[0], len(frames), policy.same_everywhere)
    return replace(call, mask=frame_mask(seen.to(device), grid[0] * grid[1]))


def seen_frames(queries: Sequence[Query], own: int, frames: int, together: bool) -> Tensor:
    """Which keys each of the call's frames reads, (B,frames,keys) bool.

    Keys are the call's frames, the clean ones from `own` on, if `together`: one rotation serves all chunks. Else, chunk
    after chunk, they are what it has gathered and its own frames.
    """
    keys, at = frames + (0 if together else sum(query.most for query in queries)), 0
    seen = torch.zeros(len(queries[0].always), frames, keys, dtype=torch.bool)
    for query in queries:
        first, at = at, at + query.most
        count = query.most - max(map(len, query.always))  # routed, of every sample as many
        for a, b in query.spans:
            seen[:, a:b, slice(a, b) if together else slice(at, at + b - a)] = True
            at += b - a
            for row, always in zip(seen, query.always):
                old = [own + i for i in always] if together else slice(first, first + len(always) + count)
                row[a:b, old] = True
    return seen


class CausalAttention(nn.Module):
    """Self-attention over a chunk and its memory; q and k are normalised over all heads together (spec 2.2)."""

    def __init__(self, width: int, heads: int, policy: MemoryPolicy, layer: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.policy, self.layer = heads, policy, layer
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, call: Call, past: Sequence[KeyValues] = (), gathered: Gathered | None = None,
        shard: Shard | None = None,
    ) -> tuple[Tensor, KeyValues, Gathered | None]:  # fmt: skip
        """x (B,T,S,D) to the same shape; keys and values of the call's clean frames; what its last chunk has read.

        past: this layer's of the memory; gathered: what an earlier call for the same only chunk has read. shard: x
        holds this rank's cells of every frame; memory and what is gathered hold all cells of this rank's heads.
        """
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q_norm(q), self.k_norm(k), v))
        if shard is not None:
            together = torch.stack([q.to(v.dtype), k.to(v.dtype), v], dim=3)
            q, k, v = cells_to_heads(together, call.table.shape[1], shard).unbind(3)
        policy, (a, b) = self.policy, call.own
        k = k.to(v.dtype)
        mean = k[:, a:b].detach().float().mean(2) if policy.routed else None
        query_means = [q[:, s:e].detach().mean((1, 2)) for s, e in (c.spans[0] for c in call.queries)]
        if policy.rotates_once:
            q, k = self._turn(q, call.table).to(v.dtype), self._turn(k, call.table).to(v.dtype)
        own = KeyValues(k[:, a:b], v[:, a:b], mean)
        chunks = self._chunks(q, k, v, query_means, [*past, own], call, gathered, shard)
        if call.mask is None:
            parts = []
            for start, *chunk, gathered in chunks:
                parts.append((start, self._attend(*chunk, gathered)))
            out = torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])], dim=1)
        elif policy.same_everywhere:
            out = frame_attention(q.to(v.dtype), k, v, call.mask)
        else:
            out = self._at_once(chunks, call.mask)
        out = out if shard is None else heads_to_cells(out, shard)
        return self.proj(out.flatten(3)), own, gathered

    def _chunks(
        self, q: Tensor, k: Tensor, v: Tensor, query_means: Sequence[Tensor], pool: Sequence[KeyValues], call: Call,
        gathered: Gathered | None, shard: Shard | None,
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Gathered]]:  # fmt: skip
        """First frame, queries, keys and values of each chunk at the positions it has, and what it has gathered."""
        for query, query_mean in zip(call.queries, query_means):
            if gathered is None or len(call.queries) > 1:
                gathered = self._gather(query, query_mean, pool, call, shard)
            for a, b in query.spans:
                own_q, own_k = q[:, a:b], k[:, a:b]
                if not self.policy.rotates_once:
                    counts = [len(row) for row in query.always] if gathered[2] is not None else [gathered[0].shape[1]]
                    table = torch.stack([call.table[n : n + b - a] for n in counts])
                    own_q, own_k = self._turn(own_q, table), self._turn(own_k, table)
                yield a, own_q.to(v.dtype), own_k.to(v.dtype), v[:, a:b], gathered

    @staticmethod
    def _turn(x: Tensor, table: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return rotate(x.float(), table)

    def _gather(
        self, query: Query, query_mean: Tensor, pool: Sequence[KeyValues], call: Call, shard: Shard | None
    ) -> Gathered:
        """The memory's part of what a chunk attends to, at the positions it has for this chunk."""
        index, valid = self._index(query, query_mean, pool, call, shard)
        device = query_mean.device
        k, v = (take([getattr(m, name) for m in pool], index, device) for name in ("k", "v"))
        if not self.policy.rotates_once:
            k = self._turn(k, call.table[: k.shape[1]]).to(v.dtype)
        return k, v, valid

    def _index(
        self, query: Query, query_mean: Tensor, pool: Sequence[KeyValues], call: Call, shard: Shard | None
    ) -> tuple[list[list[int]] | Tensor, Tensor | None]:
        """Pool indices of each sample, ascending; where samples read unequally many, which of them are real."""
        always = query.always
        if query.choices is not None:
            layer = self.layer if self.policy.route_layer is None else min(self.layer, self.policy.route_layer)
            chosen = call.choices.get((layer, query.chunk))
            if chosen is None:
                with torch.no_grad(), torch.autocast(query_mean.device.type, enabled=False):
                    means = torch.cat([m.mean for m in pool], dim=1).index_select(1, query.choices)
                    chosen = query.choices[route(query_mean, means, self.policy.routed, shard)]
                call.choices[(layer, query.chunk)] = chosen
            return torch.cat([query.fixed, chosen], dim=1).sort(dim=1).values, None
        most = max(map(len, always))
        if all(len(row) == most for row in always):
            return always, None
        valid = torch.tensor([[i < len(row) for i in range(most)] for row in always], device=query_mean.device)
        return [row + [0] * (most - len(row)) for row in always], valid

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, gathered: Gathered) -> Tensor:
        """Tokens of one chunk (B,L,S,N,K) over what it has gathered and themselves."""
        old_k, old_v, valid = gathered
        frames, cells = q.shape[1:3]
        mask = None
        if valid is not None:
            seen = torch.cat([valid, valid.new_ones(len(valid), frames)], dim=1)
            mask = seen.repeat_interleave(cells, dim=1)[:, None, None]
        if old_k.shape[1]:
            k, v = torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)
        q, k, v = (y.flatten(1, 2).transpose(1, 2) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).unflatten(1, (frames, cells))

    @staticmethod
    def _at_once(chunks: Iterator[tuple[int, Tensor, Tensor, Tensor, Gathered]], mask: BlockMask) -> Tensor:
        """All chunks in one product, over keys in the order of `seen_frames`."""
        queries, keys, last = [], [], None
        for start, q, *own, gathered in chunks:
            if gathered is not last:  # a context twin reads what its target reads
                keys.append(gathered[:2])
            queries.append((start, q))
            keys.append(own)
            last = gathered
        q = torch.cat([q for _, q in sorted(queries, key=lambda p: p[0])], dim=1)
        k, v = (torch.cat(x, dim=1) for x in zip(*keys))
        return frame_attention(q, k, v, mask)


def cells_to_heads(x: Tensor, cells: int, shard: Shard) -> Tensor:
    """(B,T,own cells,3,N,K) to (B,T,S,3,N/ranks,K): every rank's cells of this rank's heads (Ulysses)."""
    held, spans = x.shape[2], [shard.frames(cells, rank) for rank in range(shard.size)]
    x = x.unflatten(4, (shard.size, -1)).permute(4, 2, 0, 1, 3, 5, 6).flatten(0, 1)
    x = shard.all_to_all(x, [held] * shard.size, [b - a for a, b in spans])
    return x.permute(1, 2, 0, 3, 4, 5)


def heads_to_cells(x: Tensor, shard: Shard) -> Tensor:
    """(B,T,S,N/ranks,K) to (B,T,own cells,N,K), the way back."""
    spans = [shard.frames(x.shape[2], rank) for rank in range(shard.size)]
    held = spans[shard.rank][1] - spans[shard.rank][0]
    x = shard.all_to_all(x.permute(2, 0, 1, 3, 4), [b - a for a, b in spans], [held] * shard.size)
    return x.unflatten(0, (shard.size, held)).permute(2, 3, 1, 0, 4, 5).flatten(3, 4)


class PaddedCrossAttention(nn.Module):
    """Text cross-attention of Wan: padded places are zero vectors before the text's projection and are attended.

    The places beyond the given ones are one more token whose logit has log(places) added (spec 2.2): the same sum.
    """

    def __init__(self, width: int, heads: int, length: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.length = heads, length
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, runs: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """x (B,T,S,D), projected text (B,Shots,J+1,D) whose last token is the pad, to x's shape.

        runs: stretches of frames and, for each sample, the shot whose text they read; a single text serves all.
        """
        k, v = self.kv(text).chunk(2, dim=-1)
        k = self.k_norm(k).to(v.dtype)
        q = self.q_norm(self.q(x)).to(v.dtype)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        bias = q.new_zeros(1, text.shape[2])
        pads = self.length - text.shape[2] + 1
        bias[:, -1] = float("-inf") if pads == 0 else torch.log(torch.tensor(float(pads)))
        parts, single = [], text.shape[1] == 1
        for start, end, shots in [(0, x.shape[1], ())] if single else runs:
            own = (y[:, 0] if single else torch.stack([row[s] for row, s in zip(y, shots)]) for y in (k, v))
            asked, keys, values = (y.transpose(1, 2) for y in (q[:, start:end].flatten(1, 2), *own))
            parts.append(F.scaled_dot_product_attention(asked, keys, values, attn_mask=bias))
        out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return self.proj(out.transpose(1, 2).reshape(x.shape))
