"""Sums over the processes of a distributed run. A process by itself is its own sum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_alone = False


def distributed() -> bool:
    """Whether several processes work together here and now."""
    return not _alone and torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0; also inside `alone`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def world() -> int:
    """How many processes work together here and now; 1 inside `alone`."""
    return torch.distributed.get_world_size() if distributed() else 1


def share() -> tuple[int, int]:
    """(number, count) of this process among those that work together here and now: (0, 1) inside `alone`."""
    return (rank(), world()) if distributed() else (0, 1)


@contextmanager
def alone() -> Iterator[None]:
    """What is done inside is done by this process only, so it must not wait for the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def all_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient; every process must call it at the same point."""
    if world() == 1:
        return x.detach()
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def all_mean(x: Tensor) -> Tensor:
    """The mean of a floating-point tensor over all processes, likewise."""
    return all_sum(x) / world() if world() > 1 else x.detach()
