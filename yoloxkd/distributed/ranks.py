"""Rank, world size, and sums over the processes of a distributed run. A process by itself is its own sum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_single = False


def is_distributed() -> bool:
    """Whether several processes work together here and now."""
    return not _single and torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0; also inside `single_process`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def world_size() -> int:
    """How many processes work together here and now; 1 inside `single_process`."""
    return torch.distributed.get_world_size() if is_distributed() else 1


def rank_and_world_size() -> tuple[int, int]:
    """(number, count) of this process among those that work together here and now: (0, 1) inside `single_process`."""
    return (rank(), world_size()) if is_distributed() else (0, 1)


@contextmanager
def single_process() -> Iterator[None]:
    """What is done inside is done by this process only, so it must not wait for the others."""
    global _single
    before, _single = _single, True
    try:
        yield
    finally:
        _single = before


def all_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient; every process must call it at the same point."""
    if world_size() == 1:
        return x.detach()
    total = x.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def all_mean(x: Tensor) -> Tensor:
    """The mean of a floating-point tensor over all processes, likewise."""
    return all_sum(x) / world_size() if world_size() > 1 else x.detach()
