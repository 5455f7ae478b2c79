"""What student and teacher predict at the same places: paired levels, classes by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.kd.base import Step
from yoloxkd.kd.functional.divergence import class_divergence
from yoloxkd.kd.functional.importance import touched_by_any
from yoloxkd.kd.functional.precision import full_precision
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.ops.points import within_content
from yoloxkd.types import Batch, DenseOutput, Grid


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
        ours, theirs = self.student, self.teacher
        return class_divergence(ours.logits, theirs.logits, ours.objectness, theirs.objectness)

    def counted(self, batch: Batch) -> Tensor:
        """(B, N) bool: inside the picture and in no ignore region."""
        points, targets = self.grid.points, batch.targets
        return within_content(points, batch.content) & ~touched_by_any(points, targets.boxes, targets.ignore)


class SamePlaces(nn.Module):
    """Brings the predictions of a pair of dense detectors together.

    Where both have as many predictions in a cell, these are compared one by one; else the most probable of each cell.
    UserError: the two cannot be compared so.
    """

    ours: Tensor
    theirs: Tensor

    def __init__(self, pairing: Pairing, method: str) -> None:
        super().__init__()
        for who, spec in (("student", pairing.student), ("teacher", pairing.teacher)):
            if not spec.stable_locations:
                raise UserError(
                    f"--kd {method} compares class scores at every location, and the {who} gives them to {spec.predicts_for} alone; "
                    f"choose a dense {who}, or another --kd"
                )
        if pairing.teacher_scale != 1:
            raise UserError(
                f"--kd {method} compares what both say at the same locations, and with teacher.scale "
                f"{pairing.teacher_scale:g} the teacher has others; set it to 1, or choose another --kd"
            )
        shared = (pairing.classes >= 0) & pairing.taught
        if not bool(shared.any()):
            raise UserError(
                f"--kd {method} compares class scores, and the teacher has none of the student's classes to teach; "
                "choose a teacher that knows some by name, or another --kd"
            )
        self.pairing = pairing
        self.alike = pairing.student.names == pairing.teacher.names and bool(shared.all())
        self.register_buffer("ours", shared.nonzero()[:, 0], persistent=False)
        self.register_buffer("theirs", pairing.classes[shared], persistent=False)

    def forward(self, step: Step[DenseOutput]) -> Places:
        levels = self.pairing.levels
        student, teacher = step.student, step.teacher
        reduce = student.grid.per_cell != teacher.grid.per_cell
        chosen = [level.student for level in levels], [level.teacher for level in levels]
        ours = self._side(step.models.student, student, chosen[0], self.ours, reduce)
        with torch.no_grad():
            theirs = self._side(step.models.teacher, teacher, chosen[1], self.theirs, reduce)
        grid = student.grid.of_levels(chosen[0])
        if reduce:
            every = grid.per_cell
            strides = grid.point_strides[::every]
            grid = replace(grid, points=grid.points[::every], point_strides=strides, anchors=None, per_cell=1)
        return Places(ours, theirs, grid)

    def _side(self, model: nn.Module, out: DenseOutput, levels: list[int], classes: Tensor, reduce: bool) -> Side:
        assert isinstance(model, DenseDetector)
        per_cell, objectness = out.grid.per_cell, model.objectness(out)
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
