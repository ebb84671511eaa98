"""Shards as training data: a map from micro-batch number to `VideoBatch`, so that resuming needs no state."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from vgr.data.order import Mixture, Order
from vgr.data.shards import DamagedSample, Sample, Shards, latent_shots
from vgr.geometry.cameras import relative_to_first
from vgr.seeding import derive_seed
from vgr.types import Cameras, VideoBatch, Warp, latents_holding, raw_frames

CACHE_BYTES = 2 << 30  # sets whose latents are smaller than this stay in memory once read
_log = logging.getLogger(__name__)


class EncodedCaption(str):
    """A caption that brings its frozen text encoder's states (J,D) float16 along, see `vgr-prepare text=...`."""

    states: np.ndarray


def _captions(sample: Sample, shots: Sequence[dict[str, Any]], told: bool) -> tuple[str, ...]:
    story = sample.meta.get("story") if told else None
    if story:  # states that were kept are of the shots' own captions
        return tuple(f"{story} {shot['caption']}" for shot in shots)
    if sample.text is None:
        return tuple(str(shot["caption"]) for shot in shots)
    captions = tuple(EncodedCaption(shot["caption"]) for shot in shots)
    for caption, states in zip(captions, sample.text):
        caption.states = states
    return captions


def collate(
    samples: Sequence[Sample], positions: Sequence[int], frames: int | None = None, story: bool = True
) -> VideoBatch:
    """Samples to a batch; `frames` keeps the first so many raw frames (1 + n times the codec's stride).

    story: the caption of the whole clip, where there is one, stands before each shot's (causal video, spec 3.3).

    Poses are taken relative to each clip's first frame in float64 before they become float32, so that a place
    far from the map's origin costs no precision. Raises ValueError where `frames` does not fit.
    """
    clip, held = samples[0].clip, samples[0].latents.shape[1]
    of_one = (len(samples[0].c2w), held) if clip is None else (len(samples[0].c2w) * clip // held, clip)
    stride = (of_one[0] - 1) // max(of_one[1] - 1, 1) or 1
    count = len(samples[0].c2w) if frames is None else frames
    latent_frames = latents_holding(count, stride, clip)
    if raw_frames(latent_frames, stride, clip) != count or not 1 <= count <= min(len(s.c2w) for s in samples):
        fits = f"1 + n x {stride}" if clip is None else f"n x {of_one[0]}"
        raise ValueError(f"data.frames={frames}: must be {fits} and at most {len(samples[0].c2w)}")
    shots = [[shot for shot in s.meta["shots"] if shot["start"] < count] for s in samples]
    shot_BT = [latent_shots([x["start"] for x in own], latent_frames, stride, clip) for own in shots]
    return VideoBatch(
        latents=torch.from_numpy(np.stack([s.latents[:, :latent_frames] for s in samples])).float(),
        cameras=Cameras(
            relative_to_first(torch.from_numpy(np.stack([s.c2w[:count] for s in samples]))).float(),
            torch.from_numpy(np.stack([s.intrinsics[:count] for s in samples])).float(),
        ),
        fps=torch.tensor([s.fps for s in samples], dtype=torch.float32),
        captions=tuple(_captions(s, own, story) for s, own in zip(samples, shots)),
        shot=torch.from_numpy(np.stack(shot_BT)).long(),
        keys=tuple(s.key for s in samples),
        position=torch.tensor(list(positions), dtype=torch.int64),
        warp=None
        if samples[0].warp is None
        else Warp(
            torch.from_numpy(np.stack([s.warp[0][:, :latent_frames] for s in samples])).float(),
            torch.from_numpy(np.stack([s.warp[1][:count] for s in samples])),
            None if clip is None else torch.from_numpy(np.stack([s.warp[2] for s in samples])).float(),
        ),
    )


@dataclass(frozen=True)
class Part:
    """Clips of one length of one set, in an order of their own; index: their numbers in the set."""

    shards: Shards
    index: np.ndarray
    order: Order


class MixedOrder:
    """What stands at each position of a run, over sets with weights and, within a set, lengths by their clips.

    A single set of clips of one length keeps the order of its own. frames: raw frames kept, which are the same for all.
    """

    def __init__(
        self, sets: Sequence[Shards], weights: Sequence[float], seed: int, global_batch: int, frames: int | None
    ) -> None:
        found: list[tuple[float, Shards, np.ndarray]] = []
        for shards, weight in zip(sets, weights):
            lengths = np.array(shards.latent_frames() if frames is None else [0] * len(shards))
            for length in np.unique(lengths):
                index = np.flatnonzero(lengths == length)
                found.append((weight * len(index) / len(shards), shards, index))
        self.parts, self.global_batch = [], global_batch
        for i, (_, shards, index) in enumerate(found):
            of_shard = np.repeat(np.arange(len(shards.counts)), shards.counts)[index]
            counts = [n for n in np.bincount(of_shard, minlength=len(shards.counts)).tolist() if n]
            own_seed = seed if len(found) == 1 else derive_seed(seed, "order-part", i)
            self.parts.append(Part(shards, index, Order(counts, own_seed, global_batch)))
        self._mixture = Mixture([weight for weight, *_ in found], seed)

    def candidates(self, position: int) -> Iterator[tuple[Shards, int]]:
        """The set and sample at a position, then those of the same part that replace it where it is damaged."""
        b, i = divmod(position, self.global_batch)
        part, before = self._mixture.place(b)
        own = self.parts[part]
        for at in own.order.candidates(before * self.global_batch + i):
            yield own.shards, int(own.index[at])


class MicroBatches(Dataset):
    """Item i is the i-th micro-batch of this rank, counted from global batch `start` up to `stop`."""

    def __init__(
        self,
        order: MixedOrder,
        micro_batch: int,
        frames: int | None,
        max_damaged: float,
        rank: int,
        world: int,
        story: bool = True,
    ) -> None:
        self.order, self.micro_batch, self.frames = order, micro_batch, frames
        self.max_damaged, self.rank, self.world, self.story = max_damaged, rank, world, story
        self.start, self.stop = 0, 0
        self.per_batch = order.global_batch // (micro_batch * world)
        sets = {id(part.shards): part.shards for part in order.parts}.values()
        self._first = dict(zip(map(id, sets), np.cumsum([0, *map(len, sets)]).tolist()))
        self._cache: dict[int, Sample] | None = {} if sum(s.latent_bytes() for s in sets) <= CACHE_BYTES else None
        # One flag a sample in shared memory: loader workers count each damaged sample once between them.
        self.damaged = torch.zeros(sum(map(len, sets)), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return max(self.stop - self.start, 0) * self.per_batch

    def __getitem__(self, i: int) -> VideoBatch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        b, m = divmod(i, self.per_batch)
        first = (self.start + b) * self.order.global_batch + (m * self.world + self.rank) * self.micro_batch
        positions = range(first, first + self.micro_batch)
        return collate([self.sample(p) for p in positions], positions, self.frames, self.story)

    def sample(self, position: int) -> Sample:
        """The sample at a position, or the first whole one of its replacements."""
        for shards, index in self.order.candidates(position):
            number = self._first[id(shards)] + index
            if self.damaged[number]:
                continue
            if self._cache is not None and number in self._cache:
                return self._cache[number]
            try:
                sample = shards.read(index)
            except DamagedSample as error:
                self._count_damaged(number, position, error)
                continue
            if self._cache is not None:
                self._cache[number] = sample
            return sample
        raise AssertionError("candidates never end")

    def _count_damaged(self, number: int, position: int, error: DamagedSample) -> None:
        self.damaged[number] = 1
        count = int(self.damaged.sum())
        _log.warning("position %d: %s; another sample takes its place (%d damaged so far)", position, error, count)
        if count > self.max_damaged * len(self.damaged):
            raise ValueError(
                f"{count} of {len(self.damaged)} samples are damaged, more than "
                f"data.max_damaged={self.max_damaged}; the last: {error}"
            )


def data_place(trainer: pl.Trainer | None) -> tuple[int, int]:
    """(rank, ranks) among which clips are dealt; ranks that share a clip count as one."""
    place = getattr(trainer and trainer.strategy, "distributed_sampler_kwargs", None)
    return (0, 1) if place is None else (place["rank"], place["num_replicas"])


class ShardData(pl.LightningDataModule):
    """Training and validation shards in the run's order.

    train: a folder, or several as folders and {path, weight}, a weight being its share of the global batches (its
    clips where not given); each global batch is of one of them, and of clips of one length. val: a folder.
    codec_fingerprint: that of the codec the model works with; frames: raw frames kept of each clip, from its first on
    (None: all); workers: loader processes; max_damaged: share of damaged samples that are replaced before it is an
    error; val_clips: fixed validation clips, evenly over the set; story: of `collate`. Before fit, `start_batch` and
    `total_batches` say which global batches remain.
    """

    def __init__(
        self,
        train: str | Sequence[str | Mapping[str, Any]],
        val: str,
        codec_fingerprint: str | None,
        seed: int,
        global_batch: int,
        micro_batch: int,
        frames: int | None = None,
        workers: int = 0,
        max_damaged: float = 0.01,
        val_clips: int = 64,
        story: bool = True,
    ) -> None:
        super().__init__()
        if micro_batch < 1 or global_batch % micro_batch:
            raise ValueError(f"global_batch={global_batch} is not a multiple of data.micro_batch={micro_batch}")
        named = [train] if isinstance(train, str) else list(train)
        entries = [{"path": x} if isinstance(x, str) else dict(x) for x in named]
        if not entries or any(set(x) - {"path", "weight"} or "path" not in x for x in entries):
            raise ValueError(f"data.train={named}: a folder, or a list of folders and of {{path: ..., weight: ...}}")
        self.train_sets = [Shards(x["path"], codec_fingerprint) for x in entries]
        self.train_shards, self.val_shards = self.train_sets[0], Shards(val, codec_fingerprint)
        for key in ("times", "history", "text"):  # what training asks of a set must hold for all
            told = [shards.manifest["extra"].get(key) for shards in self.train_sets]
            if any(x != told[0] for x in told):
                paths = ", ".join(str(x["path"]) for x in entries)
                raise ValueError(f"data.train: {paths} differ in {key}: {told}. Train on each alone")
        weights = [len(s) if x.get("weight") is None else x["weight"] for x, s in zip(entries, self.train_sets)]
        self.order = MixedOrder(self.train_sets, weights, seed, global_batch, frames)
        self.micro_batch, self.frames, self.workers = micro_batch, frames, workers
        self.max_damaged, self.val_clips, self.story = max_damaged, val_clips, story
        self.start_batch, self.total_batches = 0, 0

    def micro_batches(self, rank: int = 0, world: int = 1) -> MicroBatches:
        """The remaining micro-batches of one rank of `world`; together the ranks see each global batch once."""
        if self.order.global_batch % (self.micro_batch * world):
            raise ValueError(
                f"global_batch={self.order.global_batch} is not a multiple of "
                f"data.micro_batch={self.micro_batch} x {world} ranks"
            )
        args = (self.order, self.micro_batch, self.frames, self.max_damaged, rank, world, self.story)
        batches = MicroBatches(*args)
        batches.start, batches.stop = self.start_batch, self.total_batches
        return batches

    def train_dataloader(self) -> DataLoader:
        """The remaining micro-batches in order, as `VideoBatch`es."""
        return DataLoader(
            self.micro_batches(*data_place(self.trainer)), batch_size=None, shuffle=False, num_workers=self.workers
        )

    def val_batches(self, size: int) -> list[VideoBatch]:
        """The fixed validation clips in batches of `size`; position is the clip's place among them."""
        count = min(self.val_clips, len(self.val_shards))
        chosen = np.linspace(0, len(self.val_shards) - 1, count).round().astype(int).tolist()
        samples = [self.val_shards.read(i) for i in chosen]
        groups = [range(a, min(a + size, count)) for a in range(0, count, size)]
        return [collate([samples[i] for i in group], group, self.frames, self.story) for group in groups]
