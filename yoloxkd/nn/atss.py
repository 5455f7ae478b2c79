"""ATSS (Zhang et al. 2020): one square anchor a location, with centre-ness (or overlap) and focal loss, on an FPN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.nn.assigners.atss import MIN_UNION, TOPK, atss_match, square_anchors
from yoloxkd.nn.assigners.match import Positives, centreness, dense_labels
from yoloxkd.nn.fpn_detector import FPNConfig, FPNDetector, SharedHead, climb, flat
from yoloxkd.ops.boxes import paired_iou, to_centre, to_corners, to_distances
from yoloxkd.ops.losses import focal_loss, full_precision, giou_loss
from yoloxkd.ops.points import locations
from yoloxkd.types import DenseOutput, Loss, Losses, Targets, task_losses

BOX_WEIGHT = 2.0
DEVIATIONS = (0.1, 0.1, 0.2, 0.2)
"""The box code is divided by these: it has about unit variance then."""
LARGEST_LOG = abs(math.log(16 / 1000))
"""A predicted side is at most e^this times the anchor's, and at least the inverse."""


class ATSSConfig(FPNConfig):
    """Keys of ATSS."""

    quality: Literal["centreness", "iou"] = Field(
        "centreness", description="what the quality branch learns; iou: the overlap, as in the release of PGD"
    )


class ATSSHead(SharedHead):
    """The towers and their three 3x3 predictors."""

    def __init__(self, cfg: ATSSConfig, classes: int, levels: int) -> None:
        super().__init__(cfg, levels, bias=False)
        self.atss_cls = nn.Conv2d(cfg.channels, classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(cfg.channels, 4, 3, padding=1)
        self.atss_centerness = nn.Conv2d(cfg.channels, 1, 3, padding=1)
        self.initialise(self.atss_cls)


class ATSS(FPNDetector):
    """ATSS on any timm backbone.

    Locations are the corners of the cells, where the anchors have their centres. `box_raw` of the output holds the shift
    of the centre in anchor sides and the logarithm of the size in anchor sides, divided by `DEVIATIONS`. `quality` is the
    logit of centre-ness, or of the overlap with the box, as the key `quality` says.
    """

    Config = ATSSConfig
    family = "atss"
    class_predictors = ("head.atss_cls.",)

    cfg: ATSSConfig

    def __init__(self, cfg: ATSSConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = ATSSHead(cfg, len(self.names), len(self.levels))

    def predict(self, features: tuple[Tensor, ...], image_size: tuple[int, int]) -> DenseOutput:
        head = self.head
        cls_towers = [climb(head.cls_convs, f) for f in features]
        reg_towers = [climb(head.reg_convs, f) for f in features]
        codes = [full_precision(s(head.atss_reg(last))) for s, (_, last) in zip(head.scales, reg_towers, strict=True)]
        sizes = tuple((m.shape[2], m.shape[3]) for m in codes)
        points, strides = locations(sizes, self.levels, codes[0].device, offset=0.0)
        raw = flat(codes)
        return DenseOutput(
            features=features,
            cls_features=tuple(first for first, _ in cls_towers),
            reg_features=tuple(first for first, _ in reg_towers),
            cls_logits=flat([head.atss_cls(last) for _, last in cls_towers]),
            box_raw=raw,
            boxes=decode(raw, points, strides),
            quality=flat([head.atss_centerness(last) for _, last in reg_towers]).squeeze(-1),
            points=points,
            strides=strides,
            sizes=sizes,
            levels=self.levels,
            image_size=image_size,
        )

    def scores(self, out: DenseOutput) -> Tensor:
        """(B, A, K) class probability times quality."""
        assert out.quality is not None
        return full_precision(out.cls_logits).sigmoid() * full_precision(out.quality).sigmoid().unsqueeze(-1)

    def losses(self, out: DenseOutput, targets: Targets) -> Losses:
        """Training losses over the batch; n is its number of positives, where an image without any counts as 1.

        cls     focal loss of every location and class, divided by n. A location in an ignore region or in padding
                (`targets.ignore`, `targets.content`) that is not positive is left out
        box     2 (1 - GIoU) of positives weighted by the centre-ness they should have, divided by the sum of the weights
                (at least 1)
        centre  binary cross entropy of positives' centre-ness, divided by n
        With `quality` iou instead of the last two: box, 2 (1 - GIoU) of positives, and iou, binary cross entropy with the
        overlap that the predicted box has, both divided by n.
        """
        assert out.quality is not None
        with torch.autocast(out.quality.device.type, enabled=False):
            match = atss_match(out.points, out.strides, out.sizes, targets)
            rows = focal_loss(full_precision(out.cls_logits), dense_labels(match, targets), match.fg)
            rows = rows.masked_fill(self.ignored(match, targets, out, 0.0), 0)
            found = Positives.of(match, targets, out.points, out.strides, TOPK * len(out.levels))
            count = match.fg.sum(1).clamp(min=1).sum()
            predicted = decode(found.at(out.box_raw), found.points, found.strides)
            wrong = BOX_WEIGHT * giou_loss(predicted, found.boxes)
            if self.cfg.quality == "iou":
                name, wanted = "iou", paired_iou(predicted.detach(), found.boxes, MIN_UNION)
                box = Loss(found.total(wrong), count)
            else:
                distances = to_distances(found.points, found.boxes)
                name, wanted = "centre", centreness(torch.where(found.used.unsqueeze(-1), distances, 1.0))
                box = Loss(found.total(wrong * wanted), found.total(wanted))
            entropy = F.binary_cross_entropy_with_logits(found.at(out.quality), wanted, reduction="none")
            terms = {"cls": Loss(rows.sum(), count), "box": box, name: Loss(found.total(entropy), count)}
            return task_losses(**terms)


def decode(raw: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """ATSS's box code (..., N, 4) at anchors centred on (..., N, 2) px of strides (..., N) -> xyxy px, at least float32."""
    code = full_precision(raw)
    code = code * torch.tensor(DEVIATIONS, dtype=code.dtype, device=code.device)
    centre, side = to_centre(square_anchors(points, strides)).split(2, dim=-1)
    size = code[..., 2:].clamp(-LARGEST_LOG, LARGEST_LOG).exp() * side
    return to_corners(torch.cat((centre + code[..., :2] * side, size), dim=-1))


def encode(boxes: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """The code (..., N, 4) that decodes to boxes (..., N, 4) xyxy px at anchors of points and strides."""
    centre, side = to_centre(square_anchors(points, strides)).split(2, dim=-1)
    wanted, size = to_centre(boxes).split(2, dim=-1)
    code = torch.cat(((wanted - centre) / side, (size / side).log()), dim=-1)
    return code / torch.tensor(DEVIATIONS, dtype=code.dtype, device=code.device)
