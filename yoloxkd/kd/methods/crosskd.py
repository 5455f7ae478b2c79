"""Cross-head distillation (CrossKD, Wang et al., arXiv 2306.11369): the student's maps through the teacher's head.

The student's map from inside each tower goes through the rest of the teacher's tower and its predictors. What comes out is
compared with what the teacher predicts, so that the student's own predictors follow the labels alone. Written from the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.predictions import Said, box_divergence, counted_locations, score_divergence
from yoloxkd.kd.methods.ld import localization_divergence
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.kd.rescaled_teacher import unwrapped
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
        said = replace(step.teacher, boxes=teacher.decode(step.teacher.box_raw, crossed.grid), grid=crossed.grid)
        counted = counted_locations(step.teacher.grid, step.batch)
        levels = [(level, crossed.grid.slices()[level.teacher]) for level in self.pairing.levels]
        foreground = [self._foreground(step, level) & counted[:, part] for level, part in levels]
        count = torch.stack([cells.sum() for cells in foreground]).sum()
        out: Losses = {}
        for (level, part), inside in zip(levels, foreground, strict=True):
            found = self._terms(crossed, said, level, part, inside)
            for term, weight in self.weights.items():
                total = found[term].masked_fill(~counted[:, part], 0).sum()
                out[LossName(self.name, term, level.stride)] = Loss(total * weight, count)
        return out

    def _crossed(self, step: Step[DenseOutput], teacher: DenseDetector) -> DenseOutput:
        """The teacher's head on the student's maps; what it says on levels that only the teacher has is of no use."""
        position = self.cfg.position
        ends: list[Maps] = []
        for tap in (Tap.CLS, Tap.REG):
            ours = _further(step.models.student, tap, getattr(step.student, tap), position)
            maps: list[Tensor] = list(getattr(step.teacher, tap))
            for level in self.pairing.levels:
                maps[level.teacher] = self.adapters(ours[level.student], maps[level.teacher], tap, level)
            ends.append(teacher.tower(tap, tuple(maps), position))
        return teacher.assemble(teacher.predict(*ends), step.teacher.image_size)

    def _foreground(self, step: Step[DenseOutput], level: LevelPair) -> Tensor:
        """(B, N) bool: the teacher's predictions of a level in cells where the student has a positive."""
        ours, theirs = step.student.grid, step.teacher.grid
        cells = step.match.fg[:, ours.slices()[level.student]].unflatten(1, (*ours.sizes[level.student], ours.per_cell))
        inside: Tensor = cells.any(-1)
        if ours.sizes[level.student] != theirs.sizes[level.teacher]:
            size = theirs.sizes[level.teacher]
            inside = F.interpolate(inside[:, None].float(), size=size, mode="nearest-exact").squeeze(1) > 0
        return inside.flatten(1).repeat_interleave(theirs.per_cell, 1)

    def _terms(
        self, crossed: DenseOutput, said: DenseOutput, level: LevelPair, part: slice, inside: Tensor
    ) -> dict[str, Tensor]:
        """Values (B, N) of a level before their weights."""
        objectness, per_cell = self.pairing.teacher.quality == "objectness", said.grid.per_cell
        ours, theirs = (Said.at(out, part, objectness, per_cell) for out in (crossed, said))
        found = {"classes": score_divergence(ours.logits, theirs.logits.sigmoid(), self.cfg.power)[0]}
        if self.distributions:
            boxes = localization_divergence(crossed.box_raw[:, part], said.box_raw[:, part], 1.0)
        else:
            boxes = box_divergence(ours.boxes, theirs.boxes, ours.boxes.new_full((), level.stride))
        found["boxes"] = boxes.masked_fill(~inside, 0)
        if "quality" in self.weights:
            assert ours.quality is not None
            assert theirs.quality is not None
            wanted = theirs.quality.sigmoid()
            if objectness:
                found["quality"], _ = score_divergence(ours.quality.unsqueeze(-1), wanted.unsqueeze(-1), self.cfg.power)
            else:
                entropy = F.binary_cross_entropy_with_logits(ours.quality, wanted, reduction="none")
                found["quality"] = entropy.masked_fill(~inside, 0)
        return found


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
    with _statistics_as_they_are(student):
        out = _entered(student).tower(tap, maps, 1, position)
    return tuple(_finite_gradient(x) for x in out)


def _finite_gradient(x: Tensor) -> Tensor:
    """The same map; what a term that is left out of a step would still send back (0 times infinity) is cut."""
    if not x.requires_grad:
        return x
    alias = x.view_as(x)
    alias.register_hook(lambda gradient: torch.nan_to_num(gradient, 0.0, 0.0, 0.0))
    return alias


@contextmanager
def _statistics_as_they_are(module: nn.Module) -> Iterator[None]:
    """Batch norms in training mode normalize by the batch without taking it into their running statistics again."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
