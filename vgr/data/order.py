"""Which samples stand in global batch b: a pure function of (seed, b), whatever the ranks and workers.

Every pass sees each sample once, in two levels: shards are shuffled and taken in windows, the samples of a
window are shuffled. Positions (the index in this endless order) run on over passes, so a batch may hold the
end of one and the beginning of the next.
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
