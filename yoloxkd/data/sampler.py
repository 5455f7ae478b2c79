"""Order of a training epoch: batches of sample keys, a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int, bool]
"""(epoch, index, strong): what names a training sample."""


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) the order in which an epoch goes through the images of a split."""
    return np.random.default_rng((seed, epoch)).permutation(n)


class EpochSampler(Sampler[list[Key]]):
    """Batches of sample keys for one epoch and one process; the order is a function of (seed, epoch) alone.

    n        images of the split
    batch    images a batch, of this process
    portrait (n,) bool, images higher than wide. Given, a batch over all processes is of one kind, so that little of it
             is padding; only images left over from both kinds meet, in one batch at most
    An epoch has n // (batch * world) batches; images left over wait for another epoch. With fewer images than one batch
    needs, an epoch is one batch of those there are, the same number in every process.
    """

    def __init__(
        self, n: int, batch: int, seed: int, rank: int = 0, world: int = 1, portrait: np.ndarray | None = None
    ) -> None:
        self.n, self.seed, self.rank, self.world, self.portrait = n, seed, rank, world, portrait
        self.batch = min(batch, max(1, n // world))
        self.set_epoch(0)

    def set_epoch(self, epoch: int, strong: bool = True, start_batch: int = 0) -> None:
        """Choose what the next iteration gives; `start_batch` skips batches, for a run resumed within an epoch."""
        self.epoch, self.strong, self.start_batch = epoch, strong, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return max(1, self.n // (self.batch * self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()
        step = self.batch * self.world
        for number in range(self.start_batch, len(self)):
            places = np.arange(number * step + self.rank, (number + 1) * step, self.world) % self.n
            yield [(self.epoch, index, self.strong) for index in order[places].tolist()]

    def _order(self) -> np.ndarray:
        order = epoch_order(self.n, self.seed, self.epoch)
        if self.portrait is None:
            return order
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        step = self.batch * self.world
        kinds = [order[~self.portrait[order]], order[self.portrait[order]]]
        whole = [kind[: len(kind) // step * step].reshape(-1, step) for kind in kinds]
        rest = np.concatenate([kind[len(kind) // step * step :] for kind in kinds])
        mixed = rest[: len(rest) // step * step].reshape(-1, step)
        batches = rng.permutation(np.concatenate([*whole, mixed]))
        return np.concatenate([batches.ravel(), rest[mixed.size :]])
