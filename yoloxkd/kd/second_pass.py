"""A second pass of the teacher or of a part of the student in a step: statistics, and gradients of terms that are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms in training mode normalize by the batch without taking it into their running statistics again."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def batch_statistics(teacher: nn.Module) -> Iterator[None]:
    """Batch norms of a detector in evaluation mode normalize by the batch where they would in training; nothing else changes.

    Their running statistics stay as they are. Norms that training keeps frozen stay on theirs.
    """
    teacher.train()
    norms = [m for m in teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    teacher.eval()
    for norm in norms:
        norm.training = True
    try:
        with frozen_statistics(teacher):
            yield
    finally:
        teacher.eval()


def finite_gradient(x: Tensor) -> Tensor:
    """The same tensor; what a term that is left out of a step would still send back (0 times infinity) is cut."""
    if not x.requires_grad:
        return x
    alias = x.view_as(x)
    alias.register_hook(lambda gradient: torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
    return alias
