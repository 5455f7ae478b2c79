"""Losses by name, not divided yet: the engine divides, over the parts of a batch and over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

TASK = "task"
"""The source of a detector's own losses."""


class LossName(NamedTuple):
    """Which loss it is; text only for the screen and for results.csv.

    Attributes:
        source: `TASK`, or the distiller, with its teacher's number where there are several: "pgd", "pgd@2"
        term: what it compares
        level: stride (px) of the feature level; None: of all levels together
    """

    source: str
    term: str
    level: int | None = None

    def __str__(self) -> str:
        term = self.term if self.source == TASK else f"{self.source}/{self.term}"
        return term if self.level is None else f"{term}/s{self.level}"


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss of some images that is not divided yet: the engine does that, for it knows the other parts of the batch.

    Attributes:
        total: scalar: with `count` a sum over these images, else their mean
        count: scalar without gradient: what these images contribute to the number that the whole batch's sum
            is divided by
        least: that number is at least this
        of: for a loss that is no quotient but a function of sums over the whole batch, such as a channel's
            variance: takes these sums (n,) to the loss. `count` holds what these images contribute to them,
            with gradient, and `total` is a factor on the result
    """

    total: Tensor
    count: Tensor | None = None
    least: float = 1.0
    of: Callable[[Tensor], Tensor] | None = None

    def mean(self) -> Tensor:
        """The loss where these images are the whole batch."""
        return self.share(self.count.detach() if self.count is not None else None)

    def share(self, whole: Tensor | None, parts: int = 1, processes: int = 1) -> Tensor:
        """What these images contribute to the loss of the whole batch.

        Args:
            whole: the sum of `count` over all parts and processes; None for a mean over images.
            parts: of the batch of a process; their contributions add up to the loss.
            processes: whose losses and gradients are averaged.
        """
        if self.count is None or whole is None:
            return self.total / parts if parts > 1 else self.total
        if self.of is None:
            return self.total / (whole.clamp(min=self.least) / processes)
        finite = whole.isfinite().all()  # sums that are not finite teach nothing
        value = self.of((whole + (self.count - self.count.detach())).where(finite, 1.0)).where(finite, 0.0)
        # every part sees the value of the whole, and only its own images' gradient
        return self.total * (value.detach() / parts + (value - value.detach()) * processes)


Losses = dict[LossName, Loss]


def task_losses(**terms: Loss) -> Losses:
    """A detector's own losses, from {term: loss}."""
    return {LossName(TASK, term): loss for term, loss in terms.items()}
