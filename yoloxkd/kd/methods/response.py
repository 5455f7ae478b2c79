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
from yoloxkd.kd.functional.predictions import Said, box_divergence, check_places, counted_locations, score_divergence
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
        self.register_buffer("ours", shared.nonzero()[:, 0], persistent=False)
        self.register_buffer("theirs", pairing.classes[shared], persistent=False)
        self.ours: Tensor
        self.theirs: Tensor

    def compare(self, step: Step[DenseOutput]) -> Losses:
        counted = counted_locations(step.student.grid, step.batch)
        positives = step.match.fg.sum(1).clamp(min=1).sum()
        out: Losses = {}
        for level in self.pairing.levels:
            found = self._compare(step, level)
            here = self._cells(counted, level, step.student.grid, found.apart.shape[1])
            for term, weight in self.weights.items():
                total = getattr(found, term).masked_fill(~here, 0).sum() * weight
                out[LossName(self.name, term, level.stride)] = Loss(total, positives)
        return out

    def maps(self, step: Step[DenseOutput]) -> dict[str, Tensor]:
        """Where the two disagree."""
        found = {}
        for level in self.pairing.levels:
            h, w = step.student.grid.sizes[level.student]
            apart = self._compare(step, level).apart
            found[f"difference, stride {level.stride}"] = apart.unflatten(1, (h, w, -1)).amax(-1)
        return found

    def _compare(self, step: Step[DenseOutput], level: LevelPair) -> Compared:
        spec, grids = self.pairing, (step.student.grid, step.teacher.grid)
        per_cell = grids[0].per_cell if grids[0].per_cell == grids[1].per_cell else 1
        ours = Said.at(step.student, grids[0].slices()[level.student], spec.student.quality == "objectness", per_cell)
        theirs = Said.at(step.teacher, grids[1].slices()[level.teacher], spec.teacher.quality == "objectness", per_cell)
        probability = theirs.logits.sigmoid()
        logits, wanted = ours.logits, probability
        if not self.every_class:
            logits, wanted = logits[..., self.ours], wanted[..., self.theirs]
        classes, apart = score_divergence(logits, wanted, self.cfg.power)
        boxes = box_divergence(ours.boxes, theirs.boxes, apart.new_full((), level.stride)) * apart
        objectness = None
        if "objectness" in self.weights:
            assert ours.quality is not None
            if spec.teacher.quality == "objectness" and theirs.quality is not None:
                target = theirs.quality.sigmoid()
            else:
                target = probability.amax(-1)
            objectness, _ = score_divergence(ours.quality.unsqueeze(-1), target.unsqueeze(-1), self.cfg.power)
        return Compared(classes, boxes, objectness, apart)

    def _cells(self, counted: Tensor, level: LevelPair, grid: Grid, compared: int) -> Tensor:
        """(B, A) of the student's predictions -> (B, N) of what is compared at a level: all of them, or one a cell."""
        here = counted[:, grid.slices()[level.student]]
        return here if here.shape[1] == compared else here[:, :: grid.per_cell]
