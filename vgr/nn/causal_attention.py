"""Attention of the causal video model: chunks of frames over themselves and what a memory policy lets them read.

Tokens are (B,T,S,D), frame-major and row-major inside a frame; heads (B,T,S,N,K). A call may hold every frame twice,
as clean context and as noisy target (packed teacher forcing, CausalCine spec 3.2): a chunk of either role reads the
clean frames before it and its own. Or the clean frames of the past come from a memory: both give equal outputs.
A target chunk may read evidence beside them, which reads what the chunk reads of the past and itself, and which no
clean frame and no other chunk reads (spec warp-adapter 8.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vgr.nn.embed import patches
from vgr.nn.flex import frame_attention, frame_mask
from vgr.nn.memory import Frame, Gathered, KeyValues, MemoryPolicy, Shown, route, take
from vgr.nn.norm import RMSNorm
from vgr.nn.rope import rope_table, rotate
from vgr.types import HistoryBlock, Layout, Shard

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
    mask: of all chunks in one fused product, see `seen_frames`; None: chunk by chunk; shown: its evidence.
    """

    queries: tuple[Query, ...]
    own: tuple[int, int]
    table: Tensor
    choices: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    mask: BlockMask | None = None
    shown: Shown | None = None


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


def plan_evidence(
    history: Sequence[HistoryBlock], frames: Sequence[tuple[Frame, int]], call: Call, policy: MemoryPolicy,
    shape: torch.Size, size: int,
) -> tuple[Shown, Tensor] | None:  # fmt: skip
    """Where the kept tokens of a call's evidence stand, and their patches (M,C*size*size); None if all are dropped.

    A token has the rotation of the target that it shows. shape: of the call's x; size: of a patch. ValueError for
    evidence of another shape, or of frames that are no targets of the call.
    """
    batch, channels, _, height, width = shape
    place, first = {f.position: f.chunk for f, role in frames if not role}, {}
    for position, chunk in place.items():
        first.setdefault(chunk, position)
    for block in history:
        count, keep = len(block.position), block.keep
        fits = keep is None or keep.dtype == torch.bool and keep.shape == (batch, count, height // size, width // size)
        if block.tier != "short" or block.latents.shape != (batch, channels, count, height, width) or not fits:
            raise ValueError(
                f"cond.history takes latents {(batch, channels, count, height, width)} of tier short and keep, if any, "
                f"bool {(batch, count, height // size, width // size)} for {count} positions, got tier {block.tier}, "
                f"{tuple(block.latents.shape)}, {None if keep is None else (keep.dtype, tuple(keep.shape))}"
            )
    position = [p for block in history for p in block.position.tolist()]
    if not place.keys() >= set(position):
        raise ValueError(f"cond.history shows frames {position}, but targets of this call are {list(place)}")
    if len(call.queries) > 1 and any(len(query.spans) == 1 for query in call.queries):
        raise ValueError(
            "evidence (cond.history) would reach later chunks: pack the call, or give chunk by chunk a state"
        )
    tokens = torch.cat([patches(block.latents.float(), size) for block in history], dim=1)
    all_kept = torch.ones(batch, 1, tokens.shape[2], dtype=torch.bool)
    keeps = [(all_kept.expand(-1, len(b.position), -1) if b.keep is None else b.keep.flatten(2).cpu()) for b in history]
    keep, spans, rows, at = torch.cat(keeps, dim=1), {}, [], 0
    for query in call.queries:
        start, inside = query.spans[0][0], [i for i, p in enumerate(position) if place[p] == query.chunk]
        sample, i, cell = keep[:, inside].nonzero(as_tuple=True)
        if len(sample):
            chosen = 0 if query.choices is None else policy.routed
            base = torch.tensor([start if policy.rotates_once else len(row) + chosen for row in query.always])
            offset = torch.tensor([position[i] - first[query.chunk] for i in inside])
            rows.append(torch.stack([sample, torch.tensor(inside)[i], cell, base[sample] + offset[i]]))
            ends = (at + sample.bincount(minlength=batch).cumsum(0)).tolist()
            spans[start], at = list(zip([at, *ends], ends)), ends[-1]
    if not rows:
        return None
    sample, frame, cell, turn = torch.cat(rows, dim=1).to(tokens.device)
    return Shown(spans, call.table[turn, cell]), tokens[sample, frame, cell]


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
        shard: Shard | None = None, shown: Tensor | None = None, told: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, KeyValues, Gathered | None, Tensor | None, tuple[Tensor, Tensor] | None]:  # fmt: skip
        """x (B,T,S,D) to the same shape; keys and values of the call's clean frames; what its last chunk has read.

        past: this layer's of the memory; gathered: what an earlier call for the same only chunk has read. shard: x
        holds this rank's cells of every frame; memory and what is gathered hold all cells of this rank's heads.
        shown (1,1,M,D): evidence where `call.shown` says, told: its rotated keys and values of an earlier call in its
        place; they are returned last, after shown to the same shape.
        """
        q, k, v = self._heads(x)
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
            parts, said, asked = [], [], None
            if shown is not None:
                asked, *told = self._heads(shown)
                asked, told[0] = (self._turn(y, call.shown.table).to(told[1].dtype) for y in (asked, told[0]))
            for start, *chunk, gathered in chunks:
                spans = None if call.shown is None else call.shown.spans.get(start)
                beside = () if spans is None else (spans, told, asked, said)
                parts.append((start, (self._beside if beside else self._attend)(*chunk, gathered, *beside)))
            shown = self.proj(torch.cat(said, dim=2).flatten(3)) if said else None
            out = torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])], dim=1)
        elif policy.same_everywhere:
            out = frame_attention(q.to(v.dtype), k, v, call.mask)
        else:
            out = self._at_once(chunks, call.mask)
        out = out if shard is None else heads_to_cells(out, self.heads, shard)
        return self.proj(out.flatten(3)), own, gathered, shown, told

    def _heads(self, x: Tensor) -> Iterator[Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (y.unflatten(-1, (self.heads, -1)) for y in (self.q_norm(q), self.k_norm(k), v))

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

    def _beside(
        self, q: Tensor, k: Tensor, v: Tensor, gathered: Gathered, spans: list[tuple[int, int]],
        told: Sequence[Tensor], asked: Tensor | None, said: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """`_attend` with the evidence of each sample, whose own outputs, if it is asked, join `said`.

        One by one: samples keep unequally many tokens, and fused kernels would rather have no mask.
        """
        rows = []
        for b, (start, end) in enumerate(spans):
            *own, old_k, old_v, valid = (None if y is None else y[b : b + 1] for y in (q, k, v, *gathered))
            evidence = [y[:, :, start:end] for y in told]
            rows.append(self._attend(*own, (old_k, old_v, valid), evidence))
            if asked is not None and start < end:
                said.append(self._attend(asked[:, :, start:end], *evidence, (old_k, old_v, valid)))
        return torch.cat(rows)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, gathered: Gathered, evidence: Sequence[Tensor] = ()) -> Tensor:
        """Tokens of one chunk (B,L,S,N,K) over what it has gathered, keys and values of evidence, and themselves."""
        old_k, old_v, valid = gathered
        shape = q.shape[1:3]
        together = [(old_k, old_v), *([evidence] if evidence else []), (k, v)]
        together = [[y.flatten(1, 2) for y in pair] for pair in together if pair[0].shape[1:3].numel()]
        k, v = (torch.cat(y, dim=1) if len(y) > 1 else y[0] for y in zip(*together))
        mask = None
        if valid is not None:
            seen = valid.repeat_interleave(old_k.shape[2], dim=1)
            mask = F.pad(seen, (0, k.shape[1] - seen.shape[1]), value=True)[:, None, None]
        q, k, v = (y.transpose(1, 2) for y in (q.flatten(1, 2), k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).unflatten(1, shape)

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
    """(B,T,own cells,3,N,K) to (B,T,S,3,own heads,K): every rank's cells of this rank's heads (Ulysses).

    Ranks hold `shard.frames(N)` of the heads, one more or less where their number does not divide.
    """
    held, own = x.shape[2], [b - a for a, b in (shard.frames(cells, rank) for rank in range(shard.size))]
    heads = [b - a for a, b in (shard.frames(x.shape[4], rank) for rank in range(shard.size))]
    pieces = [y.permute(2, 4, 0, 1, 3, 5).flatten(0, 1) for y in x.split(heads, dim=4)]
    mine = heads[shard.rank]
    x = shard.all_to_all(torch.cat(pieces), [held * n for n in heads], [n * mine for n in own])
    return x.unflatten(0, (cells, mine)).permute(2, 3, 0, 4, 1, 5)


def heads_to_cells(x: Tensor, heads: int, shard: Shard) -> Tensor:
    """(B,T,S,own heads,K) to (B,T,own cells,N,K), the way back."""
    mine, own = x.shape[3], [b - a for a, b in (shard.frames(x.shape[2], rank) for rank in range(shard.size))]
    held = own[shard.rank]
    coming = [held * (b - a) for a, b in (shard.frames(heads, rank) for rank in range(shard.size))]
    came = shard.all_to_all(x.permute(2, 3, 0, 1, 4).flatten(0, 1), [n * mine for n in own], coming).split(coming)
    return torch.cat([y.unflatten(0, (held, -1)) for y in came], dim=1).permute(2, 3, 0, 1, 4)


def text_runs(frames: Sequence[tuple[Frame, int]]) -> list[tuple[int, int, list[int]]]:
    """Stretches of frames that read the same text in every sample."""
    runs: list[tuple[int, int, list[int]]] = []
    for i, (frame, _) in enumerate(frames):
        if runs and runs[-1][2] == list(frame.prompt):
            runs[-1] = (runs[-1][0], i + 1, runs[-1][2])
        else:
            runs.append((i, i + 1, list(frame.prompt)))
    return runs


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
