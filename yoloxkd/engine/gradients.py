"""Gradient of each loss on the parameters that all losses share: its size, and its direction beside the task's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.nn.detector import Detector
from yoloxkd.types import TASK, LossName

ALL = "all"
"""The term of a sum: of every term of a source, at one level or at all."""
TASK_LOSS = LossName(TASK, "task")
"""The sum of the student's own losses."""
TRUNK = ("backbone", "neck")


@dataclass(frozen=True, slots=True)
class LossGradient:
    """A loss, or a sum of losses, and its gradient on the trunk.

    Attributes:
        loss: its value
        norm: Euclidean norm of its gradient
        share: that norm over the norm of the task's gradient
        cosine: of the angle to the task's gradient: 1 same direction, 0 unrelated, -1 opposite
    """

    loss: float
    norm: float
    share: float
    cosine: float

    def times(self, factor: float) -> LossGradient:
        """The numbers of `factor` times the loss, beside the same task."""
        return LossGradient(self.loss * factor, self.norm * factor, self.share * factor, self.cosine)


def trunk(detector: Detector[Any, Any]) -> list[nn.Parameter]:
    """What learns of the backbone and the neck; of a detector that names no such parts, everything."""
    parameters = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    return [p for name, p in parameters.items() if name.partition(".")[0] in TRUNK] or list(parameters.values())


def loss_gradients(
    losses: Mapping[LossName, Tensor], parameters: Sequence[nn.Parameter], scale: float = 1.0
) -> dict[LossName, LossGradient]:
    """Measure every loss that is not the task's, and the sums of each source's by level and by term.

    The graph is kept, and no `.grad` is touched: a backward pass may follow.

    Args:
        losses: scalars with a graph; those of source `TASK` are summed
        parameters: the trunk
        scale: losses are multiplied by it for the backward pass, as a float16 gradient scaler does

    Returns:
        `TASK_LOSS`; each other loss by its name; sums under `LossName(source, ALL, level)`, `LossName(source, term)`
        and, of everything, `LossName(source, ALL)`.
    """
    task_loss = torch.stack([value.float() for name, value in losses.items() if name.source == TASK]).sum()
    task = _gradient(task_loss, parameters, scale)
    values: dict[LossName, Tensor] = {}
    sums: dict[LossName, Tensor] = {}
    numbers = {TASK_LOSS: _compared(task_loss, task, task)}
    for name, value in losses.items():
        if name.source == TASK:
            continue
        gradient = _gradient(value.float(), parameters, scale)
        numbers[name] = _compared(value, gradient, task)
        for group in _groups(name):
            sums[group] = sums[group] + gradient if group in sums else gradient
            values[group] = values.get(group, 0.0) + value.detach()
    numbers |= {group: _compared(values[group], total, task) for group, total in sums.items()}
    return {name: _read(numbers[name]) for name in sorted(numbers, key=_place)}


def gradient_rows(losses: Sequence[Tensor], parameters: Sequence[nn.Parameter], scale: Tensor | float = 1.0) -> Tensor:
    """Gradients of scalars on all parameters, (losses, N) float32; the graph is kept, and no `.grad` is touched.

    Args:
        losses: scalars with a graph
        parameters: the trunk
        scale: as of `loss_gradients`
    """
    return torch.stack([_gradient(loss.float(), parameters, scale) for loss in losses])


def average(measured: Sequence[Mapping[LossName, LossGradient]]) -> dict[LossName, LossGradient]:
    """Means over batches; the share is that of the mean norms."""
    n = len(measured)
    task = sum(one[TASK_LOSS].norm for one in measured) / n
    out = {}
    for name in measured[0]:
        norm = sum(one[name].norm for one in measured) / n
        loss, cosine = (sum(getattr(one[name], key) for one in measured) / n for key in ("loss", "cosine"))
        out[name] = LossGradient(loss, norm, norm / task if task > 0 else 0.0, cosine)
    return out


def _groups(name: LossName) -> Iterator[LossName]:
    """The sums that a loss is part of."""
    yield LossName(name.source, ALL)
    if name.level is not None:
        yield LossName(name.source, ALL, name.level)
        yield LossName(name.source, name.term)


def _place(name: LossName) -> tuple[bool, str, bool, bool, int, str]:
    """The task first; of each source the sum, then its levels, then its terms."""
    return name.source != TASK, name.source, name.term != ALL, name.level is not None, name.level or 0, name.term


def _gradient(loss: Tensor, parameters: Sequence[nn.Parameter], scale: Tensor | float) -> Tensor:
    """(N,) float32 of all parameters in a row; zero where the loss does not depend on one."""
    if not loss.requires_grad:
        return torch.zeros(sum(p.numel() for p in parameters), device=loss.device)
    gradients = torch.autograd.grad(loss * scale, list(parameters), retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return torch.cat([part.flatten().float() for part in parts]) / scale


def _compared(loss: Tensor, gradient: Tensor, task: Tensor) -> Tensor:
    """(4,) loss, norm, norm over the task's, cosine; still on the device."""
    norm, task_norm = gradient.norm(), task.norm()
    share = torch.where(task_norm > 0, norm / task_norm, 0.0)
    product = norm * task_norm
    cosine = torch.where(product > 0, (gradient @ task) / product, 0.0)
    return torch.stack([loss.detach().float(), norm, share, cosine])


def _read(numbers: Tensor) -> LossGradient:
    return LossGradient(*numbers.tolist())
