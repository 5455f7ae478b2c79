"""Losses as the numbers that a process with the whole batch makes of them."""

from __future__ import annotations

from torch import Tensor, nn

from yoloxkd.kd.base import Context, Distiller
from yoloxkd.nn.detector import DenseDetector
from yoloxkd.types import TASK, Batch, DenseOutput, Losses, Targets


def means(losses: Losses) -> dict[str, Tensor]:
    """{text of the name: quotient}"""
    return {str(name): loss.mean() for name, loss in losses.items()}


def task(model: DenseDetector, out: DenseOutput, targets: Targets) -> dict[str, Tensor]:
    """A detector's own losses."""
    return means(model.losses(out, targets))


def distilled(module: nn.Module, out: DenseOutput, batch: Batch) -> dict[str, Tensor]:
    """The losses of a `WithTeacher` on what the student said of a batch."""
    return means(module(out, batch))


def compared(
    method: Distiller, student: DenseOutput, teacher: DenseOutput, batch: Batch, model: DenseDetector, *draw: int
) -> dict[str, Tensor]:
    """What a method makes of two outputs, by "term/s8"; model: the teacher, draw: seed and step."""
    losses = method.compare(student, teacher, batch, Context(model, *draw))
    return means({name._replace(source=TASK): loss for name, loss in losses.items()})
