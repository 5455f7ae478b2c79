"""RetinaNet (Lin et al. 2017): nine anchors a cell, max-IoU assignment, focal and L1 loss, on an FPN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import Match, dense_labels, matched_boxes
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops.boxes import from_deltas, from_distances, to_deltas
from yoloxkd.ops.constants import constant
from yoloxkd.ops.losses import focal_loss, full_precision, giou_loss
from yoloxkd.ops.points import grid_of, within_content
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Targets, task_losses

ANCHOR_SCALE = 4.0
"""Square root of the smallest anchors' area, in strides (section 4: 32 px at stride 8)."""
SCALES = tuple(2 ** (k / 3) for k in range(3))
"""Square roots of the anchors' areas over that of the smallest (section 4: three sizes an octave)."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors."""
PER_CELL = len(RATIOS) * len(SCALES)
POSITIVE, NEGATIVE = 0.5, 0.4
"""IoU from which an anchor is positive, and below which it is background (section 4)."""


class RetinaNetConfig(FPNConfig):
    """Keys of RetinaNet."""

    groups: int | None = Field(None, ge=1, le=4096, description="of the towers' group norms; null: towers without norm")
    extra_on: Literal["input", "output"] = Field(
        "input", description="what the FPN's level of stride 64 reads: the backbone's map of stride 32, or the FPN's"
    )
    relu_before_last: bool = Field(False, description="the coarsest level reads the one before through a ReLU")
    anchors: Literal["exact", "whole"] = Field(
        "exact", description="whole: of whole px, row i of n at i (H // n) px, as in torchvision"
    )
    anchor_scale: float = Field(
        ANCHOR_SCALE, ge=0.5, le=64, description="square root of a cell's smallest anchors' area, in strides"
    )
    box_loss: Literal["l1", "giou"] = Field(
        "l1", description="of the box codes, or 1 - GIoU of the boxes (torchvision's v2)"
    )


class RetinaNetHead(SharedHead):
    """The towers and their two 3x3 predictors."""

    def __init__(self, cfg: RetinaNetConfig, classes: int) -> None:
        super().__init__(cfg, levels=0, bias=cfg.groups is None)
        self.retina_cls = nn.Conv2d(cfg.channels, PER_CELL * classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(cfg.channels, PER_CELL * 4, 3, padding=1)
        self.initialize(self.retina_cls)


class RetinaNet(FPNDetector):
    """RetinaNet on any timm backbone.

    Anchors are centered on the corners of the cells. `box_raw` of the output holds the shift of the center in anchor sides
    and the logarithm of the size in anchor sides.
    """

    Config = RetinaNetConfig
    family = "retinanet"
    class_predictors = ("head.retina_cls.",)
    per_cell = PER_CELL
    offset = 0.0

    cfg: RetinaNetConfig
    head: RetinaNetHead

    def __init__(self, cfg: RetinaNetConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = RetinaNetHead(cfg, len(names))

    @property
    def extra_on_input(self) -> bool:
        return self.cfg.extra_on == "input"

    @property
    def relu_before_last(self) -> bool:
        return self.cfg.relu_before_last

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("anchors")

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head = self.head
        return Predictions([head.retina_cls(x) for x in cls], [full_precision(head.retina_reg(x)) for x in reg])

    def grid(self, sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], device: torch.device) -> Grid:
        if self.cfg.anchors == "exact":
            return super().grid(sizes, image_size, device)
        steps = [(image_size[0] // h, image_size[1] // w) for h, w in sizes]
        return grid_of(sizes, self.spec.strides, device, self.offset, self.per_cell, steps)

    def anchors(self, grid: Grid) -> Tensor:
        if self.cfg.anchors == "whole":
            return whole_anchors(grid, self.cfg.anchor_scale)
        return cell_anchors(grid.points, grid.point_strides, self.cfg.anchor_scale)

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        assert grid.anchors is not None
        return from_deltas(full_precision(raw), grid.anchors)

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        assert out.grid.anchors is not None
        usable = None if targets.content is None else within_content(out.grid.points, targets.content)
        match = max_iou_match(out.grid.anchors, targets, positive=POSITIVE, negative=NEGATIVE, claim=0.0, usable=usable)
        return match.leaving_out(targets, out.grid)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch; n is its number of positives, where an image without any counts as 1.

        cls  focal loss of every anchor and class, divided by n. Ignored anchors are left out: those whose IoU lies between
             the thresholds, and in an ignore region or in padding (`targets.ignore`, `targets.content`) those that are
             not positive
        box  sum of the absolute differences of positives' codes, or 1 - GIoU of their boxes (`box_loss`), divided by n
        """
        assert out.grid.anchors is not None
        with torch.autocast(out.cls_logits.device.type, enabled=False):
            rows = focal_loss(full_precision(out.cls_logits), dense_labels(match, targets), match.fg)
            rows = rows.masked_fill(match.ignored, 0)
            boxes = matched_boxes(match, targets)
            if self.cfg.box_loss == "giou":
                box_loss = giou_loss(out.boxes, boxes.to(out.boxes.dtype))
            else:
                box_loss = (full_precision(out.box_raw) - to_deltas(boxes, out.grid.anchors)).abs().sum(-1)
            count = match.fg.sum(1).clamp(min=1).sum()
            return task_losses(cls=Loss(rows.sum(), count), box=Loss(box_loss.masked_fill(~match.fg, 0).sum(), count))


def cell_anchors(points: Tensor, strides: Tensor, anchor_scale: float = ANCHOR_SCALE) -> Tensor:
    """Anchors (A, 4) px of locations (A, 2) px with strides (A,) px, where each location is there once for each anchor."""
    pairs = [(anchor_scale * scale, math.sqrt(ratio)) for ratio in RATIOS for scale in SCALES]
    half = constant(tuple((side / root, side * root) for side, root in pairs), points.dtype, points.device) / 2
    reach = strides.to(points.dtype).view(-1, PER_CELL, 1) * half
    return from_distances(points, torch.cat((reach, reach), dim=-1).flatten(0, 1))


def whole_anchors(grid: Grid, anchor_scale: float = ANCHOR_SCALE) -> Tensor:
    """As `cell_anchors`, of whole px as in torchvision: the root of the area is cut to whole px, then half the sides are rounded."""
    reach = []
    for (h, w), stride in zip(grid.sizes, grid.strides, strict=True):
        pairs = [(int(stride * anchor_scale * scale), math.sqrt(ratio)) for ratio in RATIOS for scale in SCALES]
        half = tuple((round(side / root / 2), round(side * root / 2)) for side, root in pairs)
        of_cell = constant(half, grid.points.dtype, grid.points.device).repeat(1, 2)
        reach.append(of_cell.expand(h * w, *of_cell.shape).flatten(0, 1))
    return from_distances(grid.points, torch.cat(reach))
