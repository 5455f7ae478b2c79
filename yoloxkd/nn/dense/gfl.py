"""GFL (Li et al. 2020): classification scores as quality, box sides as distributions, ATSS assignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.nn.assigners.atss import MIN_UNION, TOPK, atss_match
from yoloxkd.nn.assigners.match import Match, Positives, dense_labels
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import LEVELS, FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops.boxes import from_distances, paired_iou, to_distances
from yoloxkd.ops.losses import distribution_focal_loss, full_precision, giou_loss, quality_focal_loss, without_autocast
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Targets, task_losses

BOX_WEIGHT = 2.0
DISTRIBUTION_WEIGHT = 0.25
ROOM = 0.1
"""Bins that an encoded distance stays below the last one."""


class GFLConfig(FPNConfig):
    """Keys of GFL."""

    reg_max: int = Field(16, ge=1, le=1024, description="largest distance to a side, in strides")


class GFLHead(SharedHead):
    """The towers and their two 3x3 predictors."""

    def __init__(self, cfg: GFLConfig, classes: int, levels: int) -> None:
        super().__init__(cfg, levels, bias=cfg.groups is None)
        self.gfl_cls = nn.Conv2d(cfg.channels, classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(cfg.channels, 4 * (cfg.reg_max + 1), 3, padding=1)
        self.initialize(self.gfl_cls)


@dataclass(slots=True)
class GFLTerms:
    """The losses of a batch before they are summed and divided.

    cls        (B, A) of every location
    box        (B, S) of the slots of `positives`, weighted, zero in unused ones; dfl likewise
    count      scalar, the number of positives, an image without any counting as 1
    weight     scalar, the sum of the weights
    positives  the matched locations
    """

    cls: Tensor
    box: Tensor
    dfl: Tensor
    count: Tensor
    weight: Tensor
    positives: Positives


class GFL(FPNDetector):
    """GFL on any timm backbone.

    Locations are the corners of the cells (the centers of ATSS's anchors). `box_raw` of the output holds, for left, top,
    right and bottom, reg_max + 1 logits each of a distribution over distances of 0 to reg_max strides.
    """

    Config = GFLConfig
    family = "gfl"
    class_predictors = ("head.gfl_cls.",)

    cfg: GFLConfig
    head: GFLHead

    def __init__(self, cfg: GFLConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = GFLHead(cfg, len(names), len(LEVELS))

    offset = 0.0

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("distributions", self.cfg.reg_max + 1)

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head = self.head
        sides = [full_precision(scale(head.gfl_reg(x))) for scale, x in zip(head.scales, reg, strict=True)]
        return Predictions([head.gfl_cls(x) for x in cls], sides)

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        return from_distances(grid.points, expected_distances(raw) * grid.point_strides.unsqueeze(-1))

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        return atss_match(out.grid, targets).leaving_out(targets, out.grid)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch.

        cls  quality focal loss of every location and class, divided by the number of positives, where an image without
             any counts as 1. A location in an ignore region or in padding (`targets.ignore`, `targets.content`) that is
             not positive is left out
        box  2 (1 - GIoU), and dfl: 0.25 times the mean over the sides of the distribution focal loss, of positives,
             both weighted by the location's largest class probability and divided by the sum of these weights (at least 1)
        """
        with torch.autocast(out.cls_logits.device.type, enabled=False):
            terms = gfl_terms(out, match, targets)
            return task_losses(
                cls=Loss(terms.cls.sum(), terms.count),
                box=Loss(terms.box.sum(), terms.weight),
                dfl=Loss(terms.dfl.sum(), terms.weight),
            )


def expected_distances(logits: Tensor) -> Tensor:
    """Mean of each side's distribution: (..., 4 n) logits -> (..., 4) bins, at least float32. GFL eq. 5."""
    with without_autocast(logits):  # it would take the product in half precision
        p = full_precision(logits).unflatten(-1, (4, -1)).softmax(dim=-1)
        mean: Tensor = p @ torch.arange(p.shape[-1], device=p.device, dtype=p.dtype)
    return mean


def encode_distances(points: Tensor, boxes: Tensor, last: int) -> Tensor:
    """Distances (..., 4) from points (..., 2) to the sides of boxes (..., 4), all in strides, kept in [0, last - 0.1]."""
    return to_distances(points, boxes).clamp(0, last - ROOM)


def gfl_terms(out: DenseOutput, match: Match, targets: Targets) -> GFLTerms:
    """Every loss of a batch, location by location, of cls_logits and box_raw. Boxes are compared in strides of their level."""
    positives = Positives.of(match, targets, out.grid, TOPK * len(out.grid.strides))
    logits = full_precision(out.cls_logits)
    strides = positives.strides.unsqueeze(-1)
    points, boxes = positives.points / strides, positives.boxes / strides
    distributions = positives.at(out.box_raw)
    predicted = from_distances(points, expected_distances(distributions))
    weight = positives.at(logits.detach()).sigmoid().amax(-1).masked_fill(~positives.used, 0)
    iou = paired_iou(predicted.detach(), boxes, MIN_UNION)
    score = positives.spread(iou, logits.shape[1])
    rows = quality_focal_loss(logits, dense_labels(match, targets), match.fg, score).masked_fill(match.ignored, 0)
    bins = distributions.unflatten(-1, (4, -1))
    sides = distribution_focal_loss(bins, encode_distances(points, boxes, bins.shape[-1] - 1)).mean(-1)
    return GFLTerms(
        cls=rows,
        box=BOX_WEIGHT * giou_loss(predicted, boxes) * weight,
        dfl=DISTRIBUTION_WEIGHT * sides * weight,
        count=match.fg.sum(1).clamp(min=1).sum(),
        weight=weight.sum(),
        positives=positives,
    )
