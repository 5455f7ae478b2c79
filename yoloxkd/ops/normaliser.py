"""What a loss is divided by, when the batch of a step is spread over processes and taken in parts.

The rule: the loss of a step is a sum over all its images divided by one number of the whole batch, such as its positives.
Gradients are averaged over processes, and over parts. So each divides its own sum by its equal share of that number, and
the mean of these quotients is the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from yoloxkd.ops.ranks import all_sum, world

_parts: Parts | None = None


class Parts:
    """The numbers of a batch that is taken in `count` parts: counted first in every part, then shared out.

    Counting needs the forward pass of each part, since what is positive depends on the predictions.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: list[Tensor] = []
        self.shared = False
        self.at = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around the forward pass of one part."""
        with self._active():
            yield

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Around the losses of one part, once all are counted."""
        if not self.shared:
            self.found, self.shared = [all_sum(value) for value in self.found], True
        with self._active():
            yield

    @contextmanager
    def _active(self) -> Iterator[None]:
        global _parts
        _parts, self.at = self, 0
        try:
            yield
        finally:
            _parts = None

    def next(self, count: Tensor, least: float) -> Tensor:
        """The next number of the part in hand."""
        at, self.at = self.at, self.at + 1
        if self.shared:
            return self.found[at].clamp(min=least) / (world() * self.count)
        if at == len(self.found):
            self.found.append(count.detach().clone())
        else:
            self.found[at] += count.detach()
        return count.clamp(min=least)


def normaliser(count: Tensor, least: float) -> Tensor:
    """This process' equal share of a number of the whole batch, which is at least `least`.

    count  what this process' images contribute; scalar, without gradient
    """
    if _parts is not None:
        return _parts.next(count, least)
    if world() == 1:
        return count.clamp(min=least)
    return all_sum(count).clamp(min=least) / world()
