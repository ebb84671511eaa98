"""Which samples stand in global batch b: a pure function of (seed, b), whatever the ranks and workers (design 5).

Every pass sees each sample once, in two levels: shards are shuffled and taken in windows, the samples of a
window are shuffled. Positions (the index in this endless order) run on over passes, so a batch may hold the
end of one and the beginning of the next. Where there are several sets, or sizes of clips, a global batch is of one:
a `Mixture` says of which, and each has an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from vgr.seeding import numpy_generator


class Order:
    """counts: samples in each shard, in the order in which samples are numbered; window: shards shuffled together."""

    def __init__(self, counts: Sequence[int], seed: int, global_batch: int, window: int = 16) -> None:
        self.counts, self.seed, self.global_batch, self.window = tuple(counts), seed, global_batch, window
        self.samples = sum(self.counts)
        if self.samples < 1 or global_batch < 1:
            raise ValueError(f"cannot order {self.samples} samples in batches of {global_batch}; both must be positive")
        self._pass = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        first = np.concatenate([[0], np.cumsum(self.counts)])
        shards = numpy_generator(self.seed, "order-shards", epoch).permutation(len(self.counts))
        parts = []
        for w in range(0, len(shards), self.window):
            part = np.concatenate([np.arange(first[s], first[s + 1]) for s in shards[w : w + self.window]])
            parts.append(numpy_generator(self.seed, "order-samples", epoch, w).permutation(part))
        return np.concatenate(parts)

    def sample(self, position: int) -> int:
        """The sample at a position of the endless order."""
        epoch, place = divmod(position, self.samples)
        return int(self._pass(epoch)[place])

    def batch(self, b: int) -> list[int]:
        """Sample indices of global batch b, in order."""
        return [self.sample(b * self.global_batch + i) for i in range(self.global_batch)]

    def candidates(self, position: int) -> Iterator[int]:
        """The sample at a position, then those that replace it where it is damaged, without end."""
        yield self.sample(position)
        rng = numpy_generator(self.seed, "order-spare", position)
        while True:
            yield int(rng.integers(self.samples))


class Mixture:
    """Which of the parts of given weights each global batch is taken from.

    Of the first n batches part p has its share to within a block, and after every block to within one batch: a block's
    batches are dealt out by the weights' cumulated shares, then shuffled. Raises ValueError for weights not above 0.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights or not all(0 < w < np.inf for w in weights):
            raise ValueError(f"weights of the mixture {list(weights)}: all must be finite numbers above 0")
        share = np.cumsum(np.array(weights, np.float64)) / np.sum(np.array(weights, np.float64))
        self._edges, self.seed = np.append(0.0, np.append(share[:-1], 1.0)), seed
        # With at least one batch of the rarest part a block, no part's count ever falls.
        self.block = max(64, int(np.ceil(1 / np.diff(self._edges).min() - 1e-9)))
        self._dealt = lru_cache(maxsize=4)(self._deal)

    def _before(self, block: int) -> np.ndarray:
        """Batches of each part in all blocks before this one."""
        return np.diff(np.floor(block * self.block * self._edges + 0.5).astype(np.int64))

    def _deal(self, block: int) -> np.ndarray:
        counts = self._before(block + 1) - self._before(block)
        rng = numpy_generator(self.seed, "mixture", block)
        return rng.permutation(np.repeat(np.arange(len(counts)), counts))

    def place(self, b: int) -> tuple[int, int]:
        """The part that global batch b is of, and how many batches before b were of it."""
        if len(self._edges) == 2:
            return 0, b
        block, i = divmod(b, self.block)
        dealt = self._dealt(block)
        part = int(dealt[i])
        return part, int(self._before(block)[part] + (dealt[:i] == part).sum())
