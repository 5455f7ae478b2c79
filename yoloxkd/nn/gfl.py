"""GFL (Li et al. 2020): classes that are qualities, sides that are distributions, on an FPN with ATSS assignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.nn.assigners.atss import MIN_UNION, TOPK, atss_match, within
from yoloxkd.nn.assigners.match import Match, Positives, dense_labels
from yoloxkd.nn.fpn_detector import FPNConfig, FPNDetector, SharedHead, climb, flat
from yoloxkd.ops.boxes import from_distances, paired_iou, to_distances
from yoloxkd.ops.losses import distribution_focal_loss, full_precision, giou_loss, quality_focal_loss
from yoloxkd.ops.points import locations
from yoloxkd.types import DenseOutput, Loss, Losses, Targets, task_losses

BOX_WEIGHT = 2.0
DISTRIBUTION_WEIGHT = 0.25
ROOM = 0.1
"""Bins that an encoded distance stays below the last one."""


class GFLConfig(FPNConfig):
    """Keys of GFL."""

    reg_max: int = Field(16, ge=1, description="largest distance to a side, in strides")


class GFLHead(SharedHead):
    """The towers and their two 3x3 predictors."""

    def __init__(self, cfg: GFLConfig, classes: int, levels: int) -> None:
        super().__init__(cfg, levels, bias=False)
        self.gfl_cls = nn.Conv2d(cfg.channels, classes, 3, padding=1)
        self.gfl_reg = nn.Conv2d(cfg.channels, 4 * (cfg.reg_max + 1), 3, padding=1)
        self.initialise(self.gfl_cls)


@dataclass(slots=True)
class GFLTerms:
    """The losses of a batch before they are summed and divided.

    cls     (B, A) of every location
    box     (B, S) of the slots of `found`, weighted, zero in unused ones; dfl likewise
    count   scalar, the number of positives, an image without any counting as 1
    weight  scalar, the sum of the weights
    found   the positives
    """

    cls: Tensor
    box: Tensor
    dfl: Tensor
    count: Tensor
    weight: Tensor
    found: Positives


class GFL(FPNDetector):
    """GFL on any timm backbone.

    Locations are the corners of the cells (the centres of ATSS's anchors). `box_raw` of the output holds, for left, top,
    right and bottom, reg_max + 1 logits each of a distribution over distances of 0 to reg_max strides.
    """

    Config = GFLConfig
    family = "gfl"
    class_predictors = ("head.gfl_cls.",)

    cfg: GFLConfig

    def __init__(self, cfg: GFLConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = GFLHead(cfg, len(self.names), len(self.levels))

    def predict(self, features: tuple[Tensor, ...], image_size: tuple[int, int]) -> DenseOutput:
        head = self.head
        cls_towers = [climb(head.cls_convs, f) for f in features]
        reg_towers = [climb(head.reg_convs, f) for f in features]
        return self.assemble(
            [head.gfl_cls(last) for _, last in cls_towers],
            [full_precision(s(head.gfl_reg(last))) for s, (_, last) in zip(head.scales, reg_towers, strict=True)],
            image_size,
            features,
            tuple(first for first, _ in cls_towers),
            tuple(first for first, _ in reg_towers),
        )

    def assemble(
        self,
        classes: Sequence[Tensor],
        distributions: Sequence[Tensor],
        image_size: tuple[int, int],
        features: tuple[Tensor, ...] = (),
        cls_features: tuple[Tensor, ...] = (),
        reg_features: tuple[Tensor, ...] = (),
    ) -> DenseOutput:
        """The head's maps as one DenseOutput.

        Per level, finest first: classes (B, K, h, w) logits, distributions (B, 4 (reg_max + 1), h, w) logits;
        image_size (H, W) px.
        """
        sizes = tuple((m.shape[2], m.shape[3]) for m in distributions)
        points, strides = locations(sizes, self.levels, distributions[0].device, offset=0.0)
        raw = flat(distributions)
        return DenseOutput(
            features=features,
            cls_features=cls_features,
            reg_features=reg_features,
            cls_logits=flat(classes),
            box_raw=raw,
            boxes=from_distances(points, expected_distances(raw) * strides.unsqueeze(-1)),
            quality=None,
            points=points,
            strides=strides,
            sizes=sizes,
            levels=self.levels,
            image_size=image_size,
        )

    def scores(self, out: DenseOutput) -> Tensor:
        """(B, A, K) the class probability, which GFL trains to be the overlap as well."""
        return full_precision(out.cls_logits).sigmoid()

    def losses(self, out: DenseOutput, targets: Targets) -> Losses:
        """Training losses over the batch.

        cls  quality focal loss of every location and class, divided by the number of positives, where an image without
             any counts as 1. A location in an ignore region or in padding (`targets.ignore`, `targets.content`) that is
             not positive is left out
        box  2 (1 - GIoU), and dfl: 0.25 times the mean over the sides of the distribution focal loss, of positives,
             both weighted by the location's largest class probability and divided by the sum of these weights (at least 1)
        """
        with torch.autocast(out.cls_logits.device.type, enabled=False):
            match = atss_match(out.points, out.strides, out.sizes, targets)
            terms = gfl_terms(out, match, targets, self.ignored(match, targets, out, 0.0))
            return task_losses(
                cls=Loss(terms.cls.sum(), terms.count),
                box=Loss(terms.box.sum(), terms.weight),
                dfl=Loss(terms.dfl.sum(), terms.weight),
            )


def expected_distances(logits: Tensor) -> Tensor:
    """Mean of each side's distribution: (..., 4 n) logits -> (..., 4) bins, at least float32. GFL eq. 5."""
    p = full_precision(logits).unflatten(-1, (4, -1)).softmax(dim=-1)
    mean: Tensor = p @ torch.arange(p.shape[-1], device=p.device, dtype=p.dtype)
    return mean


def encode_distances(points: Tensor, boxes: Tensor, last: int) -> Tensor:
    """Distances (..., 4) from points (..., 2) to the sides of boxes (..., 4), all in strides, kept in [0, last - 0.1]."""
    return to_distances(points, boxes).clamp(0, last - ROOM)


def gfl_terms(
    out: DenseOutput, match: Match, targets: Targets, ignored: Tensor, area: Tensor | None = None
) -> GFLTerms:
    """Every loss of a batch, location by location.

    out      with cls_logits, box_raw, points and strides as `GFL` gives them
    ignored  (B, A) bool, locations without a class loss
    area     (B, 2) height and width px of each image inside the batch: locations beyond it have no class loss either
    Boxes are compared in strides of their level.
    """
    if area is not None:
        ignored = ignored | ~within(out.points, area)
    found = Positives.of(match, targets, out.points, out.strides, TOPK * len(out.levels))
    logits = full_precision(out.cls_logits)
    strides = found.strides.unsqueeze(-1)
    points, boxes = found.points / strides, found.boxes / strides
    distributions = found.at(out.box_raw)
    predicted = from_distances(points, expected_distances(distributions))
    weight = found.at(logits.detach()).sigmoid().amax(-1).masked_fill(~found.used, 0)
    overlap = paired_iou(predicted.detach(), boxes, MIN_UNION)
    score = found.spread(overlap, logits.shape[1])
    rows = quality_focal_loss(logits, dense_labels(match, targets), match.fg, score).masked_fill(ignored, 0)
    bins = distributions.unflatten(-1, (4, -1))
    sides = distribution_focal_loss(bins, encode_distances(points, boxes, bins.shape[-1] - 1)).mean(-1)
    return GFLTerms(
        cls=rows,
        box=BOX_WEIGHT * giou_loss(predicted, boxes) * weight,
        dfl=DISTRIBUTION_WEIGHT * sides * weight,
        count=match.fg.sum(1).clamp(min=1).sum(),
        weight=weight.sum(),
        found=found,
    )
