"""Gradient accumulation and DDP with the gradients of one whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.distributed.ranks import all_mean, all_sum, world_size
from yoloxkd.engine.step import TrainStep
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Batch, Draw, Losses, LossName

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
    if world_size() == 1:
        return step
    # without device_ids inputs are left where they are, which is on the device already
    return nn.parallel.DistributedDataParallel(step, **_BUFFERS_AS_THEY_ARE)


def gradients(
    step: nn.Module,
    parts: Sequence[Batch],
    draw: Draw,
    backward: Callable[[Tensor], None],
    on_losses: Callable[[int, dict[LossName, Tensor]], dict[LossName, Tensor]],
) -> dict[LossName, Tensor]:
    """Forward and backward over the parts of a batch -> the terms of the whole batch over all processes, detached.

    draw       what is drawn at random in this step follows from
    backward   of a part's loss
    on_losses  called as on_losses(part, terms) before that; gives the terms whose sum is the part's loss
    The loss of a step is a sum over all its images divided by one number of the whole batch, such as its positives. With
    several parts that number is counted first, in a forward pass without gradient: what is positive depends on the
    predictions. Gradients are reduced over processes once, with the last part.
    """
    counts = _counted(step, parts, draw) if len(parts) > 1 else None
    counters = _counters(step)
    before = [counter.clone() for counter in counters]
    added = [torch.zeros_like(counter) for counter in counters]
    sums: dict[LossName, Tensor] = {}
    for number, part in enumerate(parts):
        with ExitStack() as stack:
            if number + 1 < len(parts) and isinstance(step, nn.parallel.DistributedDataParallel):
                stack.enter_context(step.no_sync())
            losses: Losses = step(part, draw)
            for counter, start, total in zip(counters, before, added, strict=True):
                total += counter - start
                counter.copy_(start)  # every part counts from where the step began
            terms = on_losses(number, _divided(losses, counts or _over_processes(_counts(losses)), len(parts)))
            backward(torch.stack([v.float() for v in terms.values()]).sum())
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach() if name in sums else value.detach()
    for counter, total in zip(counters, added, strict=True):
        counter.add_(all_sum(total))
    if world_size() == 1:
        return sums
    return dict(zip(sums, all_mean(torch.stack(list(sums.values()))).unbind(), strict=True))


def _counts(losses: Losses) -> dict[LossName, Tensor]:
    return {name: loss.count.detach() for name, loss in losses.items() if loss.count is not None}


def _over_processes(counts: dict[LossName, Tensor]) -> dict[LossName, Tensor]:
    """The counts' sums over all processes."""
    if world_size() == 1 or not counts:
        return counts
    local = [full_precision(v) for v in counts.values()]
    sums = all_sum(torch.cat([v.flatten() for v in local])).split([v.numel() for v in local])
    return {name: total.view_as(v).to(v.dtype) for name, total, v in zip(counts, sums, local, strict=True)}


def _divided(losses: Losses, counts: dict[LossName, Tensor], parts: int) -> dict[LossName, Tensor]:
    """This part's contribution to each loss of the whole batch, whose gradients are averaged over processes."""
    return {name: loss.share(counts.get(name), parts, world_size()) for name, loss in losses.items()}


def _counted(step: nn.Module, parts: Sequence[Batch], draw: Draw) -> dict[LossName, Tensor]:
    """The counts of all parts and processes together."""
    inner = step.module if isinstance(step, nn.parallel.DistributedDataParallel) else step
    assert isinstance(inner, TrainStep)
    sums: dict[LossName, Tensor] = {}
    with torch.no_grad(), preserve_statistics(inner.detector):
        for part in parts:
            for name, count in _counts(inner.counted(part, draw)).items():
                sums[name] = sums[name] + count if name in sums else count
    return _over_processes(sums)


def _counters(module: nn.Module) -> list[Tensor]:
    """The integer buffers that modules name in `summed`: what they count is that of the whole batch, over parts and processes."""
    return [getattr(m, name) for m in module.modules() for name in getattr(m, "summed", ())]


def _changing(module: nn.Module) -> list[Tensor]:
    """Running means and variances of the batch norms that are in training mode."""
    norms = (m for m in module.modules() if isinstance(m, BatchNorm) and m.training and m.track_running_stats)
    return [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]


@contextmanager
def preserve_statistics(module: nn.Module) -> Iterator[None]:
    """Running statistics as they were before, counters included."""
    buffers = list(module.buffers())
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(buffers, before)


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Running statistics of batch norms averaged over processes: each has seen its own images only."""
    if world_size() == 1:
        return
    buffers = _changing(module)
    if buffers:
        mean = all_mean(torch.cat([b.flatten() for b in buffers]))
        parts = mean.split([b.numel() for b in buffers])
        torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])
