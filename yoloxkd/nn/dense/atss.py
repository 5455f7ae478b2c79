"""ATSS (Zhang et al. 2020): one square anchor a location, with centerness (or IoU) and focal loss, on an FPN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import nn

from yoloxkd.nn.assigners.atss import MIN_UNION, TOPK, atss_match, square_anchors
from yoloxkd.nn.assigners.match import Match, Positives, centerness, dense_labels
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import FPNConfig
from yoloxkd.nn.dense.square_anchors import BOX_WEIGHT, SquareAnchorDetector, SquareAnchorHead, decode
from yoloxkd.ops.boxes import paired_iou, to_distances
from yoloxkd.ops.losses import focal_loss, full_precision, giou_loss
from yoloxkd.types import DenseOutput, Draw, Loss, Losses, Targets, task_losses


class ATSSConfig(FPNConfig):
    """Keys of ATSS."""

    quality: Literal["centerness", "iou"] = Field(
        "centerness", description="what the quality branch learns; iou: as in the release of PGD"
    )

    @field_validator("quality", mode="before")
    @classmethod
    def _centerness(cls, value: object) -> object:
        return "centerness" if value == "centreness" else value


class ATSSHead(SquareAnchorHead):
    """With the predictor of centerness, or IoU."""

    def __init__(self, cfg: ATSSConfig, classes: int) -> None:
        super().__init__(cfg, classes, bias=cfg.groups is None)
        self.atss_centerness = nn.Conv2d(cfg.channels, 1, 3, padding=1)
        self.initialize(self.atss_cls)


class ATSS(SquareAnchorDetector):
    """ATSS on any timm backbone.

    `quality` of the output is the logit of centerness, or of the IoU with the box, as the key `quality` says.
    """

    Config = ATSSConfig
    family = "atss"

    cfg: ATSSConfig
    head: ATSSHead

    def __init__(self, cfg: ATSSConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = ATSSHead(cfg, len(names))

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head = self.head
        return Predictions([head.atss_cls(x) for x in cls], head.codes(reg), [head.atss_centerness(x) for x in reg])

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        return atss_match(out.grid, targets).leaving_out(targets, out.grid)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch; n is its number of positives, where an image without any counts as 1.

        cls     focal loss of every location and class, divided by n. A location in an ignore region or in padding
                (`targets.ignore`, `targets.content`) that is not positive is left out
        box     2 (1 - GIoU) of positives weighted by the centerness they should have, divided by the sum of the weights
                (at least 1)
        center  binary cross entropy of positives' centerness, divided by n
        With `quality` iou instead of the last two: box, 2 (1 - GIoU) of positives, and iou, binary cross entropy with the
        IoU that the predicted box has, both divided by n.
        """
        assert out.quality is not None
        with torch.autocast(out.quality.device.type, enabled=False):
            rows = focal_loss(full_precision(out.cls_logits), dense_labels(match, targets), match.fg)
            rows = rows.masked_fill(match.ignored, 0)
            positives = Positives.of(match, targets, out.grid, TOPK * len(out.grid.strides))
            count = match.fg.sum(1).clamp(min=1).sum()
            predicted = decode(positives.at(out.box_raw), square_anchors(positives.points, positives.strides))
            box_loss = BOX_WEIGHT * giou_loss(predicted, positives.boxes)
            if self.cfg.quality == "iou":
                name, target = "iou", paired_iou(predicted.detach(), positives.boxes, MIN_UNION)
                box = Loss(positives.total(box_loss), count)
            else:
                distances = to_distances(positives.points, positives.boxes)
                name, target = "center", centerness(torch.where(positives.used.unsqueeze(-1), distances, 1.0))
                box = Loss(positives.total(box_loss * target), positives.total(target))
            entropy = F.binary_cross_entropy_with_logits(positives.at(out.quality), target, reduction="none")
            terms = {"cls": Loss(rows.sum(), count), "box": box, name: Loss(positives.total(entropy), count)}
            return task_losses(**terms)
