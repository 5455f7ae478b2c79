"""Cross-head distillation (CrossKD, Wang et al., arXiv 2306.11369): the student's maps through the teacher's head.

The student's map from inside each tower goes through the rest of the teacher's tower and its predictors. What comes out is
compared with what the teacher predicts, so that the student's own predictors follow the labels alone. Written from the paper.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.predictions import LevelPredictions, box_divergence, counted_locations, score_divergence
from yoloxkd.kd.methods.ld import localization_divergence
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.kd.rescaled_teacher import unwrapped
from yoloxkd.kd.second_pass import finite_gradient, frozen_statistics
from yoloxkd.nn.dense.dense_detector import DenseDetector, Maps
from yoloxkd.nn.detector import Detector
from yoloxkd.types import DenseOutput, Loss, Losses, LossName, Tap


class CrossKDConfig(KDConfig):
    """Keys of `kd` for CrossKD."""

    alpha: float = published("crosskd", "alpha", ge=0, description="weight of the classes")
    beta: float = published("crosskd", "beta", ge=0, description="weight of the boxes, or of the sides' distributions")
    gamma: float = published(
        "crosskd", "gamma", ge=0, description="weight of centerness or objectness, where the teacher has one"
    )
    position: int = published(
        "crosskd",
        "position",
        ge=1,
        description="blocks of its own towers that the student's maps pass; a tower with fewer: all",
    )
    power: float = Field(1.0, ge=1, le=8, description="of the difference of probabilities that weighs the classes")


class CrossKD(Distiller):
    """What the teacher's head says of the student's maps, on every paired level.

    classes  sum over predictions and the teacher's classes of BCE(crossed, teacher's probability) |difference|^power
    boxes    sum over the student's foreground of 1 - GIoU with the teacher's box, or, of a teacher with distributions of box
             sides, of their divergence
    quality  centerness: binary cross entropy in the foreground; objectness: everywhere, weighted as the classes
    Each is divided by the number of the teacher's predictions in the foreground, the cells of the student's positives. The
    classes are the teacher's own: nothing is compared with the student's predictions.
    """

    Config = CrossKDConfig
    name: ClassVar[str] = "crosskd"
    counted = True

    def __init__(self, cfg: CrossKDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        self.needs = frozenset({Tap.CLS, Tap.REG})
        self.adapters = Adapters(pairing, (Tap.CLS, Tap.REG))
        self.distributions = pairing.teacher.box_code.bins is not None
        weights = {"classes": cfg.alpha, "boxes": cfg.beta}
        if pairing.teacher.quality:
            weights["quality"] = cfg.gamma
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.terms = tuple(LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights)

    def compare(self, step: Step[DenseOutput]) -> Losses:
        teacher = _entered(step.models.teacher)
        crossed = self._crossed(step, teacher)
        # of a teacher that sees another size, in px of what it sees, as those of the crossed predictions are
        teacher_output = replace(
            step.teacher, boxes=teacher.decode(step.teacher.box_raw, crossed.grid), grid=crossed.grid
        )
        counted = counted_locations(step.teacher.grid, step.batch)
        levels = [(level, crossed.grid.slices()[level.teacher]) for level in self.pairing.levels]
        foreground = [self._foreground(step, level) & counted[:, part] for level, part in levels]
        count = torch.stack([cells.sum() for cells in foreground]).sum()
        out: Losses = {}
        for (level, part), inside in zip(levels, foreground, strict=True):
            terms = self._terms(crossed, teacher_output, level, part, inside)
            for term, weight in self.weights.items():
                total = terms[term].masked_fill(~counted[:, part], 0).sum()
                out[LossName(self.name, term, level.stride)] = Loss(total * weight, count)
        return out

    def _crossed(self, step: Step[DenseOutput], teacher: DenseDetector) -> DenseOutput:
        """The teacher's head on the student's maps; what it says on levels that only the teacher has is of no use."""
        position = self.cfg.position
        ends: list[Maps] = []
        for tap in (Tap.CLS, Tap.REG):
            student_maps = _further(step.models.student, tap, getattr(step.student, tap), position)
            maps: list[Tensor] = list(getattr(step.teacher, tap))
            for level in self.pairing.levels:
                maps[level.teacher] = self.adapters(student_maps[level.student], maps[level.teacher], tap, level)
            ends.append(teacher.tower(tap, tuple(maps), position))
        return teacher.assemble(teacher.predict(*ends), step.teacher.image_size)

    def _foreground(self, step: Step[DenseOutput], level: LevelPair) -> Tensor:
        """(B, N) bool: the teacher's predictions of a level in cells where the student has a positive."""
        student_grid, teacher_grid = step.student.grid, step.teacher.grid
        size = (*student_grid.sizes[level.student], student_grid.per_cell)
        cells = step.match.fg[:, student_grid.slices()[level.student]].unflatten(1, size)
        inside: Tensor = cells.any(-1)
        if student_grid.sizes[level.student] != teacher_grid.sizes[level.teacher]:
            inside = (
                F.interpolate(
                    inside[:, None].float(), size=teacher_grid.sizes[level.teacher], mode="nearest-exact"
                ).squeeze(1)
                > 0
            )
        return inside.flatten(1).repeat_interleave(teacher_grid.per_cell, 1)

    def _terms(
        self, crossed: DenseOutput, teacher_output: DenseOutput, level: LevelPair, part: slice, inside: Tensor
    ) -> dict[str, Tensor]:
        """Values (B, N) of a level before their weights."""
        objectness, per_cell = self.pairing.teacher.quality == "objectness", teacher_output.grid.per_cell
        outputs = crossed, teacher_output
        crossed_level, teacher_level = (LevelPredictions.at(out, part, objectness, per_cell) for out in outputs)
        terms = {"classes": score_divergence(crossed_level.logits, teacher_level.logits.sigmoid(), self.cfg.power)[0]}
        if self.distributions:
            boxes = localization_divergence(crossed.box_raw[:, part], teacher_output.box_raw[:, part], 1.0)
        else:
            stride = crossed_level.boxes.new_full((), level.stride)
            boxes = box_divergence(crossed_level.boxes, teacher_level.boxes, stride)
        terms["boxes"] = boxes.masked_fill(~inside, 0)
        if "quality" in self.weights:
            assert crossed_level.quality is not None
            assert teacher_level.quality is not None
            target = teacher_level.quality.sigmoid()
            if objectness:
                terms["quality"], _ = score_divergence(
                    crossed_level.quality.unsqueeze(-1), target.unsqueeze(-1), self.cfg.power
                )
            else:
                entropy = F.binary_cross_entropy_with_logits(crossed_level.quality, target, reduction="none")
                terms["quality"] = entropy.masked_fill(~inside, 0)
        return terms


def _entered(detector: Detector[Any, Any]) -> DenseDetector:
    """The detector as one whose head can be entered. UserError: it is none."""
    inner = unwrapped(detector)
    if not isinstance(inner, DenseDetector):
        raise UserError(
            f"--kd crosskd enters the head of a dense detector, and a {inner.family} has none to enter; choose a dense detector, "
            "or another --kd"
        )
    return inner


def _further(student: Detector[Any, Any], tap: Tap, maps: Maps, position: int) -> Maps:
    """The student's maps after `position` blocks of a tower, from those after one."""
    if position == 1:
        return maps
    with frozen_statistics(student):
        out = _entered(student).tower(tap, maps, 1, position)
    return tuple(finite_gradient(x) for x in out)
