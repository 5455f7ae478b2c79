"""Distillation of predictions: classes by binary cross entropy where the two disagree, boxes by GIoU (BCKD, ICCV 2023).

It needs no adapter: what is compared are probabilities and boxes, whatever the detectors are made of.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.predictions import (
    LevelPredictions,
    box_divergence,
    check_places,
    counted_locations,
    score_divergence,
)
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.types import DenseOutput, Grid, Loss, Losses, LossName, Tap


class ResponseConfig(KDConfig):
    """Keys of `kd` for the distillation of predictions."""

    alpha: float = published("response", "alpha", ge=0, description="weight of the classes")
    beta: float = published("response", "beta", ge=0, description="weight of the boxes")
    gamma: float = published(
        "response", "gamma", ge=0, description="weight of the objectness, for a student that has one"
    )
    power: float = Field(1.0, ge=1, le=8, description="of the difference of probabilities that weighs the classes")


class Compared(NamedTuple):
    """A level, prediction by prediction (B, N): classes, boxes and objectness before their weights, and how far apart
    the probabilities are, at most over classes."""

    classes: Tensor
    boxes: Tensor
    objectness: Tensor | None
    apart: Tensor


class Response(Distiller):
    """The predictions of every paired level.

    classes     sum over predictions and shared classes of BCE(student, teacher's probability) |difference|^power
    boxes       sum over predictions of (1 - GIoU) times the largest difference over classes
    objectness  as the classes, of the student's objectness; wanted is the teacher's, or its largest class probability
    Each is divided by the student's number of positives in the batch, an image without any counting as 1. Where one of the
    two predicts more often in a cell than the other, the most probable prediction stands for the cell.
    """

    Config = ResponseConfig
    name: ClassVar[str] = "response"
    counted = True

    def __init__(self, cfg: ResponseConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        check_places(self.name, pairing)
        shared = (pairing.classes >= 0) & pairing.taught
        if not bool(shared.any()):
            raise UserError(
                "--kd response compares class probabilities, and the teacher has none of the student's classes to teach; choose "
                "a teacher that knows some, by name, or a method that compares maps, such as --kd pkd"
            )
        if cfg.gamma > 0 and pairing.student.quality != "objectness":
            raise UserError(
                "kd.gamma weighs the objectness, which the student does not predict; set it to 0, or choose a yolox student"
            )
        self.cfg = cfg
        self.needs = frozenset[Tap]()
        weights = {"classes": cfg.alpha, "boxes": cfg.beta, "objectness": cfg.gamma}
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.terms = tuple(LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights)
        self.every_class = torch.equal(pairing.classes, torch.arange(len(pairing.teacher.names))) and bool(shared.all())
        self.register_buffer("student_classes", shared.nonzero()[:, 0], persistent=False)
        self.register_buffer("teacher_classes", pairing.classes[shared], persistent=False)
        self.student_classes: Tensor
        self.teacher_classes: Tensor

    def compare(self, step: Step[DenseOutput]) -> Losses:
        counted = counted_locations(step.student.grid, step.batch)
        positives = step.match.fg.sum(1).clamp(min=1).sum()
        out: Losses = {}
        for level in self.pairing.levels:
            compared = self._compare(step, level)
            counts = self._cells(counted, level, step.student.grid, compared.apart.shape[1])
            for term, weight in self.weights.items():
                total = getattr(compared, term).masked_fill(~counts, 0).sum() * weight
                out[LossName(self.name, term, level.stride)] = Loss(total, positives)
        return out

    def maps(self, step: Step[DenseOutput]) -> dict[str, Tensor]:
        """Where the two disagree."""
        differences = {}
        for level in self.pairing.levels:
            h, w = step.student.grid.sizes[level.student]
            apart = self._compare(step, level).apart
            differences[f"difference, stride {level.stride}"] = apart.unflatten(1, (h, w, -1)).amax(-1)
        return differences

    def _compare(self, step: Step[DenseOutput], level: LevelPair) -> Compared:
        spec, grids = self.pairing, (step.student.grid, step.teacher.grid)
        per_cell = grids[0].per_cell if grids[0].per_cell == grids[1].per_cell else 1
        with_objectness = [side.quality == "objectness" for side in (spec.student, spec.teacher)]
        parts = grids[0].slices()[level.student], grids[1].slices()[level.teacher]
        student = LevelPredictions.at(step.student, parts[0], with_objectness[0], per_cell)
        teacher = LevelPredictions.at(step.teacher, parts[1], with_objectness[1], per_cell)
        probability = teacher.logits.sigmoid()
        logits, targets = student.logits, probability
        if not self.every_class:
            logits, targets = logits[..., self.student_classes], targets[..., self.teacher_classes]
        classes, apart = score_divergence(logits, targets, self.cfg.power)
        boxes = box_divergence(student.boxes, teacher.boxes, apart.new_full((), level.stride)) * apart
        objectness = None
        if "objectness" in self.weights:
            assert student.quality is not None
            if spec.teacher.quality == "objectness" and teacher.quality is not None:
                target = teacher.quality.sigmoid()
            else:
                target = probability.amax(-1)
            objectness, _ = score_divergence(student.quality.unsqueeze(-1), target.unsqueeze(-1), self.cfg.power)
        return Compared(classes, boxes, objectness, apart)

    def _cells(self, counted: Tensor, level: LevelPair, grid: Grid, compared: int) -> Tensor:
        """(B, A) of the student's predictions -> (B, N) of what is compared at a level: all of them, or one a cell."""
        counts = counted[:, grid.slices()[level.student]]
        return counts if counts.shape[1] == compared else counts[:, :: grid.per_cell]
