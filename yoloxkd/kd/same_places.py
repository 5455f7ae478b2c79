"""What student and teacher predict at the same places: paired levels, classes by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.kd.base import Step
from yoloxkd.kd.functional.divergence import class_divergence
from yoloxkd.kd.functional.importance import touched_by_any
from yoloxkd.kd.functional.precision import full_precision
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.two_stage.box_code import decode
from yoloxkd.ops.points import within_content
from yoloxkd.types import Batch, DenseOutput, Grid, RoIOutput


@dataclass(frozen=True, slots=True)
class Side:
    """One detector's predictions at the places.

    logits      (B, N, K) of each class that both know
    objectness  (B, N) logits whose probability that of the classes is multiplied by, or None
    boxes       (B, N, 4) px
    slices      the places' levels among its own predictions
    best        (B, N) where a cell's predictions are not compared one by one: the one that stands for its cell; per_cell of them
    """

    logits: Tensor
    objectness: Tensor | None
    boxes: Tensor
    slices: tuple[slice, ...]
    best: Tensor | None
    per_cell: int

    def score(self) -> Tensor:
        """(B, N) the largest class probability, without gradient."""
        best = self.logits.detach().amax(-1).sigmoid()
        return best if self.objectness is None else best * self.objectness.detach().sigmoid()

    def at_places(self, values: Tensor) -> Tensor:
        """(B, A, ...) of its own predictions -> (B, N, ...)"""
        values = torch.cat([values[:, part] for part in self.slices], 1)
        if self.best is None:
            return values
        of_cells: Tensor = values.unflatten(1, (-1, self.per_cell))
        index = self.best.view(*self.best.shape, *[1] * (of_cells.ndim - 2))
        return of_cells.gather(2, index.expand(-1, -1, 1, *of_cells.shape[3:])).squeeze(2)


@dataclass(frozen=True, slots=True)
class Places:
    """N places on the paired levels, finest first, and what both say there; grid: where they lie, of the student's levels."""

    student: Side
    teacher: Side
    grid: Grid

    def divergence(self) -> Tensor:
        """(B, N) how far the student's class probabilities are from the teacher's, summed over classes."""
        student, teacher = self.student, self.teacher
        return class_divergence(student.logits, teacher.logits, student.objectness, teacher.objectness)

    def counted(self, batch: Batch) -> Tensor:
        """(B, N) bool: inside the image and in no ignore region."""
        points, targets = self.grid.points, batch.targets
        return within_content(points, batch.content) & ~touched_by_any(points, targets.boxes, targets.ignore)


class SamePlaces(nn.Module):
    """Brings the predictions of a pair of dense detectors together; of two detectors in two stages, their proposal networks'.

    Proposal networks score one class, any object, at the anchors of the paired levels. Where both have as many predictions in a
    cell, these are compared one by one; else the most probable of each cell. UserError: the two cannot be compared so.
    """

    student_classes: Tensor
    teacher_classes: Tensor

    def __init__(self, pairing: Pairing, method: str) -> None:
        super().__init__()
        proposals = in_two_stages(pairing)
        for who, spec in (("student", pairing.student), ("teacher", pairing.teacher)):
            if not spec.stable_locations and not proposals:
                raise UserError(
                    f"--kd {method} compares class scores at every location, and the {who} gives them to {spec.predicts_for} alone; "
                    f"choose a dense {who}, or another --kd"
                )
        if pairing.teacher_scale != 1:
            raise UserError(
                f"--kd {method} compares what both say at the same locations, and with teacher.scale "
                f"{pairing.teacher_scale:g} the teacher has others; set it to 1, or choose another --kd"
            )
        shared, of_teacher = (pairing.classes >= 0) & pairing.taught, pairing.classes
        if proposals:
            shared, of_teacher = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        if not bool(shared.any()):
            raise UserError(
                f"--kd {method} compares class scores, and the teacher has none of the student's classes to teach; "
                "choose a teacher that knows some by name, or another --kd"
            )
        self.pairing = pairing
        self.alike = proposals or (pairing.student.names == pairing.teacher.names and bool(shared.all()))
        self.register_buffer("student_classes", shared.nonzero()[:, 0], persistent=False)
        self.register_buffer("teacher_classes", of_teacher[shared], persistent=False)

    def forward(self, step: Step[Any]) -> Places:
        step = of_locations(step)
        levels = self.pairing.levels
        student, teacher = step.student, step.teacher
        reduce = student.grid.per_cell != teacher.grid.per_cell
        student_levels, teacher_levels = ([getattr(level, who) for level in levels] for who in ("student", "teacher"))
        student_side = self._side(step.models.student, student, student_levels, self.student_classes, reduce)
        with torch.no_grad():
            teacher_side = self._side(step.models.teacher, teacher, teacher_levels, self.teacher_classes, reduce)
        grid = student.grid.of_levels(student_levels)
        if reduce:
            every = grid.per_cell
            strides = grid.point_strides[::every]
            grid = replace(grid, points=grid.points[::every], point_strides=strides, anchors=None, per_cell=1)
        return Places(student_side, teacher_side, grid)

    def _side(self, model: nn.Module, out: DenseOutput, levels: list[int], classes: Tensor, reduce: bool) -> Side:
        per_cell = out.grid.per_cell
        objectness = model.objectness(out) if isinstance(model, DenseDetector) else None
        slices = tuple(out.grid.slices()[i] for i in levels)
        logits = full_precision(out.cls_logits)
        if not self.alike:
            logits = logits.index_select(2, classes)
        best = None
        if reduce and per_cell > 1:
            of_levels = torch.cat([logits[:, part] for part in slices], 1)
            best = of_levels.detach().amax(-1).unflatten(1, (-1, per_cell)).argmax(2)
        side = Side(logits, objectness, out.boxes, slices, best, per_cell)
        if best is None and len(levels) == len(out.grid.strides):
            return replace(side, boxes=full_precision(out.boxes))
        objectness = None if objectness is None else side.at_places(objectness)
        boxes = full_precision(side.at_places(out.boxes))
        return replace(side, logits=side.at_places(logits), objectness=objectness, boxes=boxes)


def in_two_stages(pairing: Pairing) -> bool:
    """Whether both detectors have a second stage, which refines boxes of proposals."""
    sides = pairing.student, pairing.teacher
    return all(not spec.stable_locations and spec.box_code.kind == "anchors" for spec in sides)


def of_locations(step: Step[Any]) -> Step[DenseOutput]:
    """The step of what predicts at every location: a dense detector itself, or the proposal network of one in two stages."""
    if not isinstance(step.student, RoIOutput):
        return step
    student = step.student.rpn
    assert student.grid.anchors is not None
    # the network's own boxes have no gradient
    boxes = decode(student.grid.anchors, full_precision(student.box_raw))
    return replace(step, student=replace(student, boxes=boxes), teacher=step.teacher.rpn, match=step.match.rpn)
