"""Gradients of one batch, spread over processes and taken in parts: the same as those of the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.engine.step import TrainStep
from yoloxkd.ops.normaliser import Parts
from yoloxkd.ops.ranks import all_mean, world
from yoloxkd.types import Batch

# newer releases have another name for it
_BUFFERS_AS_THEY_ARE: dict[str, Any] = next(
    {name: False}
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(nn.parallel.DistributedDataParallel.__init__).parameters
)
BatchNorm = nn.modules.batchnorm._BatchNorm


def wrapped(step: TrainStep) -> nn.Module:
    """The step as DistributedDataParallel where there are several processes; weights become those of rank zero.

    Buffers are not broadcast: `average_statistics` keeps those that change alike.
    """
    if world() == 1:
        return step
    # without device_ids inputs are left where they are, which is on the device already
    return nn.parallel.DistributedDataParallel(step, **_BUFFERS_AS_THEY_ARE)


def gradients(
    step: nn.Module,
    parts: Sequence[Batch],
    backward: Callable[[Tensor], None],
    on_losses: Callable[[int, dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Forward and backward over the parts of a batch -> the terms of the whole batch over all processes, detached.

    backward   of a part's loss
    on_losses  called as on_losses(part, terms) before that; gives the terms whose sum is the part's loss
    Gradients are reduced over processes once, with the last part. With several parts the losses' normalisers are counted
    first, in a forward pass without gradient.
    """
    shares = _counted(step, parts) if len(parts) > 1 else None
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        with ExitStack() as stack:
            if number + 1 < len(parts) and isinstance(step, nn.parallel.DistributedDataParallel):
                stack.enter_context(step.no_sync())
            if shares is not None:
                stack.enter_context(shares.sharing())
            terms = step(part)
            if len(parts) > 1:
                terms = {name: value / len(parts) for name, value in terms.items()}
            terms = on_losses(number, terms)
            backward(torch.stack([v.float() for v in terms.values()]).sum())
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    if world() == 1:
        return sums
    return dict(zip(sums, all_mean(torch.stack(list(sums.values()))).unbind(), strict=True))


def _counted(step: nn.Module, parts: Sequence[Batch]) -> Parts:
    plain = step.module if isinstance(step, nn.parallel.DistributedDataParallel) else step
    assert isinstance(plain, TrainStep)
    shares = Parts(len(parts))
    with torch.no_grad(), _statistics_kept(plain.detector):
        for part in parts:
            with shares.counting():
                plain.task_losses(part)
    return shares


def _changing(module: nn.Module) -> list[Tensor]:
    """Running means and variances of the batch norms that are in training mode."""
    norms = (m for m in module.modules() if isinstance(m, BatchNorm) and m.training and m.track_running_stats)
    return [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Running statistics as they were before, counters included."""
    buffers = list(module.buffers())
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Running statistics of batch norms averaged over processes: each has seen its own images only."""
    if world() == 1:
        return
    buffers = _changing(module)
    if buffers:
        mean = all_mean(torch.cat([b.flatten() for b in buffers]))
        for buffer, value in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))
