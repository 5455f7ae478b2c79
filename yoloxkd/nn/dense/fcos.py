"""FCOS (Tian et al. 2019, improved version): a box and a centerness at every location of an FPN."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.nn.assigners.fcos import RADIUS, fcos_match
from yoloxkd.nn.assigners.match import Match, Positives, centerness, dense_labels
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import LEVELS, FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops.boxes import from_distances, to_distances
from yoloxkd.ops.losses import focal_loss, full_precision, giou_loss, log_iou_loss
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Targets, task_losses

BOX_LOSSES = {"giou": giou_loss, "iou": log_iou_loss}


class FCOSConfig(FPNConfig):
    """Keys of FCOS; the defaults are the improved version that the distillation papers train."""

    conv_bias: bool = Field(True, description="the towers' convolutions have a bias")
    center_sampling: bool = Field(True, description="only locations near a box's center are positive")
    norm_on_bbox: bool = Field(True, description="distances in strides through a ReLU; else in px through exp")
    centerness_on_reg: bool = Field(True, description="centerness is read from the regression tower")
    box_loss: Literal["giou", "iou"] = Field("giou", description="1 - GIoU, or -log IoU")
    relu_before_last: bool = Field(True, description="the coarsest level reads the one before through a ReLU")
    points: Literal["center", "corner"] = Field(
        "center", description="of the cells; corner: row i of n lies at i (H // n) px, as in torchvision"
    )
    scale_layers: bool = Field(True, description="a learned factor for the distances of each level")
    score: Literal["product", "root"] = Field("product", description="class times center-ness, or its square root")


class FCOSHead(SharedHead):
    """The towers and their three 3x3 predictors."""

    def __init__(self, cfg: FCOSConfig, classes: int, levels: int) -> None:
        super().__init__(cfg, levels, bias=cfg.conv_bias)
        if not cfg.scale_layers:
            self.scales = nn.ModuleList(nn.Identity() for _ in range(levels))
        self.conv_cls = nn.Conv2d(cfg.channels, classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(cfg.channels, 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(cfg.channels, 1, 3, padding=1)
        self.initialize(self.conv_cls)
        if cfg.norm_on_bbox:
            # From a bias of zero half of all distances start below zero, where a ReLU passes no gradient; a side that is
            # below zero everywhere would never learn. So every side starts one stride away.
            nn.init.ones_(self.conv_reg.get_parameter("bias"))


class FCOS(FPNDetector):
    """FCOS on any timm backbone.

    `box_raw` of the output holds the distances to left, top, right and bottom, not negative: in strides of the level
    with `norm_on_bbox`, else in px. `quality` is the centerness logit.
    """

    Config = FCOSConfig
    family = "fcos"
    quality = "localization"
    class_predictors = ("head.conv_cls.",)

    cfg: FCOSConfig
    head: FCOSHead

    def __init__(self, cfg: FCOSConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = FCOSHead(cfg, len(names), len(LEVELS))

    @property
    def relu_before_last(self) -> bool:
        return self.cfg.relu_before_last

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("distances")

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head, cfg = self.head, self.cfg
        distances = []
        for scale, x in zip(head.scales, reg, strict=True):
            code = full_precision(scale(head.conv_reg(x)))
            distances.append(F.relu(code) if cfg.norm_on_bbox else code.exp())
        center = [head.conv_centerness(x) for x in (reg if cfg.centerness_on_reg else cls)]
        return Predictions([head.conv_cls(x) for x in cls], distances, center)

    def grid(self, sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], device: torch.device) -> Grid:
        if self.cfg.points == "center":
            return super().grid(sizes, image_size, device)
        steps = [(image_size[0] // h, image_size[1] // w) for h, w in sizes]
        return grid_of(sizes, self.spec.strides, device, offset=0.0, steps=steps)

    @property
    def code_in_strides(self) -> bool:
        return self.cfg.norm_on_bbox

    @property
    def root_of_score(self) -> bool:
        return self.cfg.score == "root"

    def scores(self, out: DenseOutput) -> Tensor:
        scores = super().scores(out)
        return scores.sqrt() if self.root_of_score else scores

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        distances = full_precision(raw)
        return from_distances(
            grid.points, distances * grid.point_strides.unsqueeze(-1) if self.cfg.norm_on_bbox else distances
        )

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        radius = RADIUS if self.cfg.center_sampling else None
        return fcos_match(out.grid, targets, radius=radius).leaving_out(targets, out.grid)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch; n is its number of positives, at least 1.

        cls     focal loss of every location and class, divided by n. A location in an ignore region or in padding
                (`targets.ignore`, `targets.content`) that is not positive is left out
        box     `box_loss` of positives weighted by the centerness they should have, divided by the sum of the weights.
                Boxes are compared in the unit of `box_raw`
        center  binary cross entropy of positives' centerness, divided by n
        """
        assert out.quality is not None
        with torch.autocast(out.quality.device.type, enabled=False):
            rows = focal_loss(full_precision(out.cls_logits), dense_labels(match, targets), match.fg)
            rows = rows.masked_fill(match.ignored, 0)
            positives = Positives.of(match, targets, out.grid, self._most_positives(out.grid))
            distances = self.distances(positives)
            center = centerness(distances)
            count = match.fg.sum()
            predicted = positives.at(out.box_raw)
            origin = predicted.new_zeros(2)
            box_loss = BOX_LOSSES[self.cfg.box_loss](
                from_distances(origin.expand(*predicted.shape[:-1], 2), predicted),
                from_distances(origin.expand(*predicted.shape[:-1], 2), distances),
            )
            entropy = F.binary_cross_entropy_with_logits(positives.at(out.quality), center, reduction="none")
            return task_losses(
                cls=Loss(rows.sum(), count),
                box=Loss(positives.total(box_loss * center), positives.total(center), 1e-6),
                center=Loss(positives.total(entropy), count),
            )

    def _most_positives(self, grid: Grid) -> int:
        """Locations that can be positive for one box."""
        if not self.cfg.center_sampling:
            return len(grid.points)
        steps = grid.steps or [(stride, stride) for stride in grid.strides]
        inside = [
            [math.ceil(2 * RADIUS * s / step) for step in pair] for s, pair in zip(grid.strides, steps, strict=True)
        ]
        return sum(min(down, h) * min(right, w) for (down, right), (h, w) in zip(inside, grid.sizes, strict=True))

    def distances(self, positives: Positives) -> Tensor:
        """(B, S, 4) what `box_raw` should be at positives; one in unused slots."""
        distances = to_distances(positives.points, positives.boxes)
        if self.cfg.norm_on_bbox:
            distances = distances / positives.strides.unsqueeze(-1)
        return torch.where(positives.used.unsqueeze(-1), distances, 1.0)
