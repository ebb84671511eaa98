"""What a chunk of a causal video remembers: which older frames it reads, at which positions, and where they are kept.

One policy covers the family (CausalCine, spec 4 and 3.7): full history, a window of chunks, sinks of the video's or
the shot's first frames, and content-aware routing, which scores every older frame by the dot product of mean query
and mean key, both before rotation, and reads the best few. Frames are latent frames; a query is one chunk of a call.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from vgr.types import Conditioning, HistoryBlock, Shard

PLACES = ("device", "pinned", "recomputed")


@dataclass(frozen=True)
class MemoryPolicy:
    """Which older frames a chunk reads beside itself.

    window: chunks before its own, None for all; sink, shot_sink: the first frames of the video, of its own shot;
    routed: frames older than the window that are chosen by content. relative: what is read gets positions 0, 1, ...
    in ascending time, the own chunk last, so no rollout leaves the trained span; else positions are absolute.
    per_step: the choice is made anew in each denoising step instead of in a chunk's first. route_layer: the layer
    that chooses for itself and all later ones (None: each for itself); earlier ones choose for themselves.
    place: of what has left the window (all, without a window): "device", "pinned" host memory, or "recomputed": only
    latents and what they were committed under are kept, and the commits run again, in order and layer by layer, when
    a chunk reads. Keys of an old chunk depend on what it had read itself, so nothing less gives the same numbers.
    ValueError for what does not go together.
    """

    window: int | None = None
    sink: int = 0
    shot_sink: int = 0
    routed: int = 0
    relative: bool = True
    per_step: bool = False
    route_layer: int | None = None
    place: str = "device"

    def __post_init__(self) -> None:
        if self.window is None and (self.sink or self.shot_sink or self.routed):
            raise ValueError(
                f"model.window=null reads all history, beside which sink={self.sink}, shot_sink={self.shot_sink} and "
                f"routed={self.routed} have nothing to add: give a window in chunks, or leave them at 0"
            )
        if min(self.sink, self.shot_sink, self.routed, self.window or 0) < 0:
            raise ValueError("model.window, sink, shot_sink and routed count chunks and frames: give 0 or more")
        if self.routed and self.shot_sink:
            raise ValueError("model.shot_sink does not go with model.routed: routing finds the shot's frames itself")
        if self.place not in PLACES:
            raise ValueError(f"model.place={self.place}: choose {' or '.join(PLACES)}")

    @property
    def rotates_once(self) -> bool:
        """Keys are rotated by absolute positions, once: also where what is read is one stretch, which is the same."""
        return not self.relative or not (self.sink or self.shot_sink or self.routed)

    @property
    def same_everywhere(self) -> bool:
        """Keys as they are rotated once serve all chunks of a call, which read the same frames in every layer."""
        return self.rotates_once and not self.routed

    @property
    def makes_all_again(self) -> bool:
        """Nothing of the past is kept but latents, not even what a chunk has read: its every call reads anew."""
        return self.place == "recomputed" and self.window is None

    def kept(self, frames: Sequence[Frame], upcoming: int) -> list[bool]:
        """Which frames of the past a chunk from `upcoming` on may read, or needs to make again what it reads."""
        if self.window is None or self.routed or (self.place == "recomputed" and self.shot_sink):
            return [True] * len(frames)
        last = frames[-1].shot
        starts = {(b, s): [f.position for f in frames if f.shot[b] == s][: self.shot_sink] for b, s in enumerate(last)}
        pinned = {p for positions in starts.values() for p in positions}
        return [f.chunk >= upcoming - self.window or f.position < self.sink or f.position in pinned for f in frames]

    def reads(self, pool: Sequence[Frame], query: Frame) -> tuple[list[list[int]], list[int]]:
        """What the chunk of `query`, its first frame, reads of `pool`, the clean frames there are.

        Indices into the pool, ascending: those each sample always reads, and those of which routing takes the best.
        """
        older = [i for i, f in enumerate(pool) if f.chunk < query.chunk]
        if self.window is None:
            return [older] * len(query.shot), []
        recent = [i for i in older if pool[i].chunk >= query.chunk - self.window]
        distant = [i for i in older if pool[i].chunk < query.chunk - self.window]
        sinks = [i for i in distant if pool[i].position < self.sink]
        choices = [i for i in distant if pool[i].position >= self.sink]
        if self.routed:
            few = len(choices) <= self.routed
            always = sorted(sinks + (choices if few else [])) + recent
            return [always] * len(query.shot), [] if few else choices
        rows = []
        for b, shot in enumerate(query.shot):
            first = [i for i in older if pool[i].shot[b] == shot][: self.shot_sink]
            rows.append(sorted({*sinks, *first, *recent}))
        return rows, []


@dataclass(frozen=True)
class Frame:
    """A latent frame: position in the video, chunk, and in each sample the shot it shows and the text it reads."""

    position: int
    chunk: int
    shot: tuple[int, ...]
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class KeyValues:
    """Keys and values (B,T,S,N,K) of a chunk's clean frames and their mean keys (B,T,N,K), fp32 and never rotated.

    Keys are rotated already where the policy `rotates_once`; means are there where the policy routes.
    """

    k: Tensor
    v: Tensor
    mean: Tensor | None

    def at(self, device: torch.device | str) -> KeyValues:
        """Keys and values copied elsewhere, pinned on the host; the means stay where they are."""
        if torch.device(device).type != "cpu":
            return KeyValues(*(x.to(device, non_blocking=True) for x in (self.k, self.v)), self.mean)
        copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x) for x in (self.k, self.v)]
        return KeyValues(*copies, self.mean)


@dataclass(frozen=True)
class Made:
    """What a chunk was committed with, to do it again: latents (B,C,T,H,W), times (B,T), cond and routing's choices."""

    x: Tensor
    t: Tensor
    cond: Conditioning
    choices: dict[tuple[int, int], Tensor]


@dataclass(frozen=True)
class ChunkMemory:
    """A committed chunk: its frames and, for each layer, their keys and values. Never changed, so states share it.

    made: where the place is "recomputed"; layers are empty then once the chunk has left the window.
    """

    frames: tuple[Frame, ...]
    layers: tuple[KeyValues, ...]
    made: Made | None = None


# Of one layer and chunk: rotated keys and values (B,n,S,N,K) of what it reads, and which are real (B,n), None if all.
Gathered = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Shown:
    """Where the kept tokens of a call's evidence stand in one row of M: chunk after chunk, in each sample after sample.

    spans: by a chunk's first target frame in the call, the stretch of the row of each sample; table (M,K/2): rotations.
    """

    spans: dict[int, list[tuple[int, int]]]
    table: Tensor


@dataclass(frozen=True)
class Told:
    """Evidence of the chunk at work, for its later steps: each layer's rotated keys and values (1,1,M,N,K)."""

    history: tuple[HistoryBlock, ...]
    shown: Shown
    layers: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class CausalVideoState:
    """What the model remembers; opaque to callers.

    blocks: committed chunks that may still be read; frames, chunk: latent frames and chunks committed; choices,
    gathered and told: what the chunk at work has chosen, read and was shown, layer by layer; detach: commits store no
    graph.
    """

    blocks: tuple[ChunkMemory, ...]
    frames: int
    chunk: int
    detach: bool
    choices: dict[tuple[int, int], Tensor] | None = None
    gathered: tuple[Gathered, ...] | None = None
    told: Told | None = None


def committed(
    state: CausalVideoState, policy: MemoryPolicy, frames: list[Frame], kept: list[KeyValues], made: Made
) -> CausalVideoState:
    """The state with a call's chunks, without what no later chunk reads, older ones at the policy's place."""
    blocks = list(state.blocks)
    for chunk in sorted({f.chunk for f in frames}):
        inside = [i for i, f in enumerate(frames) if f.chunk == chunk]
        a, b = inside[0], inside[-1] + 1
        own = None
        if policy.place == "recomputed" and state.detach:
            choices = {key: choice for key, choice in made.choices.items() if key[1] == chunk}
            cond = replace(made.cond.frames(a, b), cameras=None, history=())
            own = Made(made.x[:, :, a:b].detach().clone(), made.t[:, a:b], cond, choices)
        layers = tuple(_cut(kv, a, b, state.detach) for kv in kept)
        blocks.append(ChunkMemory(tuple(frames[a:b]), layers, own))
    upcoming = frames[-1].chunk + 1
    every = [f for block in blocks for f in block.frames]
    wanted = {f.position for f, yes in zip(every, policy.kept(every, upcoming)) if yes}
    blocks = [block for block in blocks if any(f.position in wanted for f in block.frames)]
    window = policy.window or 0
    blocks = [_away(b, policy) if b.frames[0].chunk < upcoming - window else b for b in blocks]
    return CausalVideoState(tuple(blocks), state.frames + len(frames), upcoming, state.detach)


def _away(block: ChunkMemory, policy: MemoryPolicy) -> ChunkMemory:
    """A block that has left the window, at the policy's place."""
    if block.made is not None:
        return replace(block, layers=())
    there = policy.place != "pinned" or block.layers[0].k.device.type == "cpu"
    return block if there else replace(block, layers=tuple(kv.at("cpu") for kv in block.layers))


def _cut(kv: KeyValues, a: int, b: int, detach: bool) -> KeyValues:
    """Frames a to b; detached ones are copies, so that dropping other frames of a call frees their memory."""
    parts = [None if x is None else x[:, a:b] for x in (kv.k, kv.v, kv.mean)]
    return KeyValues(*(x.detach().clone() if detach and x is not None else x for x in parts))


def route(query: Tensor, means: Tensor, count: int, shard: Shard | None = None) -> Tensor:
    """Indices (B,count), ascending, of the frames whose mean keys (B,M,N,K) fit a chunk's mean query (B,N,K) best.

    The score is one number a frame, summed over heads (CausalCine eq. 6-8); of equals the earlier frame wins. With
    a shard each rank holds some of the heads and all choose by the sum.
    """
    scores = torch.einsum("bnk,bmnk->bm", query.float(), means.float())
    scores = scores if shard is None else shard.all_reduce(scores)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def take(blocks: Sequence[Tensor], index: list[list[int]] | Tensor, device: torch.device) -> Tensor:
    """Frames (B,n,...) of tensors (B,T,...) joined along time, chosen by index, per sample; whole if it is all.

    Stretches that are the same for every sample are views where one tensor holds them.
    """
    if isinstance(index, Tensor):
        if len(blocks) == 1:
            return blocks[0][torch.arange(len(index), device=index.device)[:, None], index.to(blocks[0].device)]
        index = index.tolist()
    ends = list(accumulate(block.shape[1] for block in blocks))
    if all(row == index[0] for row in index):
        parts = [blocks[j][:, a:b] for j, a, b in _stretches(index[0], ends)]
        parts = [x.to(device, non_blocking=True) for x in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) if parts else blocks[0][:, :0]
    rows = []
    for b, row in enumerate(index):
        parts = [blocks[j][b, a:e].to(device, non_blocking=True) for j, a, e in _stretches(row, ends)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _stretches(index: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int, int]]:
    """(block, first, end) of runs of neighbouring frames, for blocks that end at these frames."""
    runs: list[tuple[int, int, int]] = []
    for i in index:
        block = bisect_right(ends, i)
        frame = i - (ends[block - 1] if block else 0)
        if runs and runs[-1][0] == block and runs[-1][2] == frame:
            runs[-1] = (block, runs[-1][1], frame + 1)
        else:
            runs.append((block, frame, frame + 1))
    return runs
