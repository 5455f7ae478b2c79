"""General Instance Distillation (GID, Dai et al., CVPR 2021): regions on which student and teacher disagree.

Their features, the distances between them, and what both answer there; no ground truth is read. Of two detectors in two
stages the regions and answers are the proposal networks', and both heads are asked about these regions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import softmax_divergence
from yoloxkd.kd.functional.masks import MIN_UNION
from yoloxkd.kd.functional.precision import full_precision
from yoloxkd.kd.functional.predictions import box_code
from yoloxkd.kd.functional.regions import best_boxes, pooled_regions, region_levels
from yoloxkd.kd.functional.relation import relation_error
from yoloxkd.kd.neck import NeckDistiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.same_places import Places, SamePlaces, in_two_stages
from yoloxkd.kd.same_regions import RegionPredictions, SameRegions
from yoloxkd.nn.assigners.atss import square_anchors
from yoloxkd.ops.boxes import pairwise_iou
from yoloxkd.types import DenseOutput, Grid, Loss, Losses, LossName

CANDIDATES = 3000
"""Predictions of an image, by their score, that instances are chosen from."""
INSTANCES, OVERLAP, LEAST_SIDE = 10, 0.3, 10.0
"""Of an image, at most; of two of them, at most; px, which either side of an instance is above."""
BINS, SAMPLES = 10, 2
"""Of pooled features, along a side."""
MATCHED = 0.5
"""Overlap from which an anchor answers for an instance; one that no anchor fits so well has its best one."""


class GIDConfig(KDConfig):
    """Keys of `kd` for GID."""

    alpha: float = published("gid", "alpha", ge=0, description="weight of the instances' features")
    relation: float = published("gid", "relation", ge=0, description="weight of the distances between instances")
    cls: float = published("gid", "cls", ge=0, description="weight of the class response")
    box: float = published("gid", "box", ge=0, description="weight of the box response")
    beta: float = published("gid", "beta", ge=0, description="where the box response turns from a square to a line")
    k: int = Field(INSTANCES, ge=1, le=100, description="instances of an image")


def disagreement(
    student: Tensor, teacher: Tensor, student_boxes: Tensor, teacher_boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """How far apart both are about each place, and the box of the one that is surer. GID eq. (1) and (2).

    student, teacher (B, N) largest class probabilities, boxes (B, N, 4) px -> score (B, N), boxes (B, N, 4)
    """
    difference = teacher - student
    return difference.abs(), torch.where(difference[..., None] > 0, teacher_boxes, student_boxes)


@torch.no_grad()
def matched_anchors(anchors: Tensor, boxes: Tensor, used: Tensor) -> Tensor:
    """Anchors (N, 4) px that answer for an instance (B, k, 4) px, those in `used` (B, k): (B, N) bool."""
    overlap = pairwise_iou(full_precision(boxes), full_precision(anchors), MIN_UNION) * used[..., None]
    best = overlap.amax(2, keepdim=True)
    return ((overlap >= MATCHED) | ((overlap == best) & (best > 0))).any(1)


class GID(NeckDistiller):
    """GID on the neck and on the predictions of a dense detector, or of a proposal network and a head. Terms are of all levels.

    feature, relation   of the instances' pooled features
    cls, box            of the predictions whose anchors answer for an instance
    head_cls, head_box  of the first box head's answers about the instances, with the weights of `cls` and `box`
    """

    Config = GIDConfig
    name: ClassVar[str] = "gid"

    def __init__(self, cfg: GIDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        self.places = SamePlaces(pairing, self.name)
        weights = {"feature": cfg.alpha, "relation": cfg.relation, "cls": cfg.cls, "box": cfg.box}
        if in_two_stages(pairing):
            weights |= {"head_cls": cfg.cls, "head_box": cfg.box}
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.heads = (
            SameRegions(pairing, self.name) if "head_cls" in self.weights or "head_box" in self.weights else None
        )
        self.terms = tuple(LossName(self.name, term) for term in self.weights)

    def compare(self, step: Step[Any]) -> Losses:
        places = self.places(step)
        counted = places.counted(step.batch)
        boxes, used = self.instances(step, places, counted)
        terms: dict[str, Tensor] = {}
        if self.weights.keys() & {"feature", "relation"}:
            terms |= self._features(step, boxes, used)
        if self.weights.keys() & {"cls", "box"}:
            terms |= self._responses(places, boxes, used, counted)
        if self.heads is not None:
            terms |= self._heads(self.heads(step, boxes), used)
        return {LossName(self.name, term): Loss(terms[term].mean() * w) for term, w in self.weights.items()}

    @torch.no_grad()
    def instances(self, step: Step[DenseOutput], places: Places, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, k, 4) px of the instances, best first, and which of these there are (B, k) bool."""
        student, teacher = places.student, places.teacher
        score, boxes = disagreement(student.score(), teacher.score(), student.boxes, teacher.boxes)
        score = score.masked_fill(~counted, -torch.inf)
        if score.shape[1] > CANDIDATES:
            score, index = score.topk(CANDIDATES, 1)
            boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        content = step.batch.content.to(boxes.dtype)[:, None]
        low, high = content[..., :2].repeat(1, 1, 2), content[..., 2:].repeat(1, 1, 2)
        boxes = boxes.maximum(low).minimum(high)
        index, used = best_boxes(boxes, score, self.cfg.k, OVERLAP, LEAST_SIDE)
        return boxes.gather(1, index[..., None].expand(-1, -1, 4)), used

    def maps(self, step: Step[DenseOutput]) -> dict[str, Tensor]:
        """How far student and teacher are apart at each cell."""
        places = self.places(step)
        score = (places.teacher.score() - places.student.score()).abs() * places.counted(step.batch)
        levels = zip(self.pairing.levels, places.grid.by_level(score), strict=True)
        return {f"disagreement, stride {level.stride}": value.amax(-1) for level, value in levels}

    def _features(self, step: Step[DenseOutput], boxes: Tensor, used: Tensor) -> dict[str, Tensor]:
        levels = list(self.levels(step))
        level = region_levels(boxes, [each.pair.stride for each in levels])
        cells, excluded = [each.cell for each in levels], [each.excluded for each in levels]
        student_features, teacher_features = (
            pooled_regions(maps, cells, boxes, level, used, bins=BINS, samples=SAMPLES, excluded=excluded)
            for maps in ([each.student for each in levels], [each.teacher for each in levels])
        )
        error = (student_features - teacher_features).square().sum((1, 2, 3))
        return {
            "feature": error / (used.sum(1) * student_features.shape[2]).clamp_min(1),
            "relation": relation_error(student_features.flatten(2), teacher_features.flatten(2), used),
        }

    def _heads(self, predictions: RegionPredictions, used: Tensor) -> dict[str, Tensor]:
        """Of the class that the teacher finds most probable, the box: (B,) each."""
        count = used.sum(1).clamp_min(1)
        student, teacher = predictions.codes()
        errors = F.smooth_l1_loss(student, teacher, reduction="none", beta=self.cfg.beta).sum(-1)
        classes = softmax_divergence(predictions.student, predictions.teacher)
        return {
            "head_cls": classes.masked_fill(~used, 0.0).sum(1) / count,
            "head_box": errors.masked_fill(~used, 0.0).sum(1) / count,
        }

    def _responses(self, places: Places, boxes: Tensor, used: Tensor, counted: Tensor) -> dict[str, Tensor]:
        anchors = anchors_of(places.grid)
        answering = matched_anchors(anchors, boxes, used) & counted
        count = answering.sum(1).clamp_min(1)
        divergence = places.divergence()
        code = [box_code(side.boxes, anchors) for side in (places.student, places.teacher)]
        errors = F.smooth_l1_loss(code[0], code[1].detach(), reduction="none", beta=self.cfg.beta).sum(-1)
        return {
            "cls": divergence.masked_fill(~answering, 0.0).sum(1) / count,
            "box": errors.masked_fill(~answering, 0.0).sum(1) / count,
        }


def anchors_of(grid: Grid) -> Tensor:
    """(N, 4) px: a detector's anchors, or at each location the one square that ATSS gives it."""
    return square_anchors(grid.points, grid.point_strides) if grid.anchors is None else grid.anchors
