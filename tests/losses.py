"""Losses as the numbers that a process with the whole batch makes of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from yoloxkd.engine.step import StudentPass
from yoloxkd.kd.base import Distiller, Pair, Step
from yoloxkd.nn.detector import Detector
from yoloxkd.types import TASK, Batch, DenseOutput, Draw, Losses, Targets


def means(losses: Losses) -> dict[str, Tensor]:
    """{text of the name: quotient}"""
    return {str(name): loss.mean() for name, loss in losses.items()}


def task(model: Detector[Any, Any], out: DenseOutput, targets: Targets) -> dict[str, Tensor]:
    """A detector's own losses."""
    return means(model.losses(out, targets, model.assign(out, targets)))


def passed(student: Detector[Any, Any], batch: Batch, draw: Draw = Draw()) -> StudentPass:
    """A batch that the student has seen."""
    out = student(batch.images)
    return StudentPass(student, out, batch, student.assign(out, batch.targets, draw), draw)


def distilled(module: nn.Module, student: Detector[Any, Any], batch: Batch) -> dict[str, Tensor]:
    """The losses of a `TeacherLosses`."""
    return means(module(passed(student, batch)))


def step_of(
    student: DenseOutput, teacher: DenseOutput, batch: Batch, model: Detector[Any, Any], *draw: int
) -> Step[DenseOutput]:
    """A step in which one model explains both outputs, and assigns; draw: seed and step."""
    return Step(student, teacher, batch, model.assign(student, batch.targets), Pair(model, model), *draw)


def compared(
    method: Distiller, student: DenseOutput, teacher: DenseOutput, batch: Batch, model: Detector[Any, Any], *draw: int
) -> dict[str, Tensor]:
    """What a method makes of two outputs, by "term/s8"; arguments as of `step_of`."""
    step = step_of(student, teacher, batch, model, *draw)
    return means({name._replace(source=TASK): loss for name, loss in method.compare(step).items()})
