"""RepPoints (Yang et al. 2019): nine points an object, found in two steps, instead of a box; their moments are the box."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import Match, TwoMatches, dense_labels, eligible, matched_boxes
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.assigners.nearest_point import nearest_point_match
from yoloxkd.nn.deform import DeformableConv
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops import devices
from yoloxkd.ops.losses import focal_loss, full_precision
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Targets, task_losses

POSITIVE, NEGATIVE = 0.5, 0.4
"""Overlaps of a first-stage box from which the second stage is positive, and below which it is background."""
SIDE = 3
"""The points of an object start as the cells of a kernel of this side."""
COORDINATES = 2 * SIDE * SIDE
BOX_UNIT = 4
"""Strides: boxes are divided by so much before they are compared."""
BETA = 0.11
"""Of the smooth L1 loss: quadratic below."""
WEIGHTS = (0.5, 1.0)
"""Of the box loss of the first and of the second points."""
OFFSET_GRADIENT = 0.1
"""The share of the gradient that reaches the first points through the convolutions that they deform."""
MOMENT_GRADIENT = 0.01
"""The share of the gradient that reaches the factors of the deviations."""


class RepPointsConfig(FPNConfig):
    """Keys of RepPoints."""

    stacked_convs: int = Field(3, ge=1, le=64, description="blocks of each tower")
    groups: int | None = Field(
        32, ge=1, le=4096, description="of the group norms in FPN and towers; null: no norm, as first published"
    )


class RepPointsHead(SharedHead):
    """The towers, the convolutions that the first points deform, and what predicts classes and points."""

    def __init__(self, cfg: RepPointsConfig, classes: int) -> None:
        super().__init__(cfg, 0, bias=cfg.groups is None)
        channels = cfg.channels
        self.moment_transfer = nn.Parameter(torch.zeros(2))
        self.reppoints_cls_conv = DeformableConv(channels, channels, SIDE, padding=SIDE // 2, bias=False)
        self.reppoints_cls_out = nn.Conv2d(channels, classes, 1)
        self.reppoints_pts_init_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.reppoints_pts_init_out = nn.Conv2d(channels, COORDINATES, 1)
        self.reppoints_pts_refine_conv = DeformableConv(channels, channels, SIDE, padding=SIDE // 2, bias=False)
        self.reppoints_pts_refine_out = nn.Conv2d(channels, COORDINATES, 1)
        self.initialize(self.reppoints_cls_out)
        for conv in (self.reppoints_cls_conv, self.reppoints_pts_refine_conv):
            conv.reset_parameters()  # the release leaves these two as they are made

    def predict_level(self, cls: Tensor, reg: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, K, h, w) and both stages' points (B, 36, h, w) from the towers' ends on a level."""
        first = full_precision(self.reppoints_pts_init_out(F.relu(self.reppoints_pts_init_conv(reg))))
        offset = _slowed(first, OFFSET_GRADIENT) - kernel_cells(first)
        logits: Tensor = self.reppoints_cls_out(F.relu(self.reppoints_cls_conv(cls, offset)))
        change = self.reppoints_pts_refine_out(F.relu(self.reppoints_pts_refine_conv(reg, offset)))
        return logits, torch.cat((first, full_precision(change) + first.detach()), dim=1)


class RepPoints(FPNDetector):
    """RepPoints on any timm backbone, with boxes of the points' mean and deviation ("moment").

    Locations are the corners of the cells. `box_raw` of the output holds the first points, y before x, as shifts from the
    location in strides, and then the second ones likewise.
    """

    Config = RepPointsConfig
    family = "reppoints"
    class_predictors = ("head.reppoints_cls_out.",)

    cfg: RepPointsConfig
    head: RepPointsHead

    def __init__(self, cfg: RepPointsConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = RepPointsHead(cfg, len(names))

    offset = 0.0

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("points")

    @property
    def extra_on_input(self) -> bool:
        return True

    @property
    def neck_groups(self) -> int | None:
        return self.cfg.groups

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        levels = [self.head.predict_level(*maps) for maps in zip(cls, reg, strict=True)]
        return Predictions([logits for logits, _ in levels], [points for _, points in levels])

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        return self.boxes_of(raw[..., COORDINATES:], grid)

    def boxes_of(self, points: Tensor, grid: Grid, cell: Tensor | slice = slice(None)) -> Tensor:
        """Points (..., n, 18) of one stage -> boxes (..., n, 4) px, float32 at least; cell: of which of the grid's locations."""
        box = moment_boxes(full_precision(points), full_precision(self.head.moment_transfer))
        origin, stride = grid.points[cell].to(box.dtype), grid.point_strides[cell].to(box.dtype).unsqueeze(-1)
        return box * stride + torch.cat((origin, origin), dim=-1)

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> TwoMatches:
        """The match of the second points and the classes, with that of the first points beside it."""
        with torch.no_grad():
            proposals = self.boxes_of(out.box_raw[..., :COORDINATES], out.grid)
        usable = eligible(out.grid, targets)
        second = max_iou_match(
            proposals, targets, positive=POSITIVE, negative=NEGATIVE, claim=0.0, usable=usable
        ).leaving_out(targets, out.grid)
        return TwoMatches.beside(second, nearest_point_match(out.grid, targets))

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch.

        cls     focal loss of every location and class. Locations that are neither positive nor background are left out
        points  0.5 times the smooth L1 loss of the sides of the first points' boxes, in units of 4 strides, of the positives
                of the first match; box: the same of the second points' boxes, whole, of those of the second
        Each is divided by the number of positives of its match (cls: the second), an image without any counting as 1.
        """
        assert isinstance(match, TwoMatches)
        with torch.autocast(out.cls_logits.device.type, enabled=False):
            rows = focal_loss(full_precision(out.cls_logits), dense_labels(match, targets), match.fg)
            first, second = self.box_terms(out, targets, match)
            counts = [part.fg.sum(1).clamp(min=1).sum() for part in (match.box, match)]
            return task_losses(
                cls=Loss(rows.masked_fill(match.ignored, 0).sum(), counts[1]),
                points=Loss(first.sum(), counts[0]),
                box=Loss(second.sum(), counts[1]),
            )

    def box_terms(self, out: DenseOutput, targets: Targets, match: TwoMatches) -> tuple[Tensor, Tensor]:
        """The box losses (B, A) of both stages, times their weights and zero where nothing is positive."""
        stages = match.box, match
        if match.fg.device.type not in devices.READ_DEVICES:
            parts = out.box_raw.split(COORDINATES, dim=-1)
            tables = [
                self._smooth_l1(points, matched_boxes(stage, targets), out.grid).masked_fill(~stage.fg, 0)
                for points, stage in zip(parts, stages, strict=True)
            ]
        else:
            tables = self._of_positives(out, targets, stages)
        return WEIGHTS[0] * tables[0], WEIGHTS[1] * tables[1]

    def _of_positives(self, out: DenseOutput, targets: Targets, stages: tuple[Match, Match]) -> list[Tensor]:
        """The box losses (B, A) of both stages, of which the positives alone are computed."""
        places = [stage.fg.nonzero(as_tuple=True) for stage in stages]
        image, cell = (torch.cat(index) for index in zip(*places, strict=True))
        # one gather, so that one gradient of the map's size is made, in the layout of the map
        codes = out.box_raw.mT[image, :, cell].split([len(cells) for _, cells in places])
        tables = []
        for number, (code, stage, (image, cell)) in enumerate(zip(codes, stages, places, strict=True)):
            points = code[:, number * COORDINATES : (number + 1) * COORDINATES]
            target_boxes = full_precision(targets.boxes)[image, stage.gt[image, cell]]
            box_loss = self._smooth_l1(points, target_boxes, out.grid, cell)
            tables.append(box_loss.new_zeros(stage.fg.shape).index_put((image, cell), box_loss))
        return tables

    def _smooth_l1(
        self, points: Tensor, target_boxes: Tensor, grid: Grid, cell: Tensor | slice = slice(None)
    ) -> Tensor:
        """Smooth L1 of the sides of the points' boxes (..., n), in units of 4 strides."""
        boxes = self.boxes_of(points, grid, cell)
        unit = BOX_UNIT * grid.point_strides[cell].to(boxes.dtype).unsqueeze(-1)
        return F.smooth_l1_loss(boxes / unit, target_boxes.to(boxes.dtype) / unit, beta=BETA, reduction="none").sum(-1)


def moment_boxes(points: Tensor, transfer: Tensor) -> Tensor:
    """Points (..., 18), y before x -> boxes (..., 4) x1 y1 x2 y2 in the points' unit: mean -/+ deviation times e^transfer.

    transfer (2,), of x and y; `MOMENT_GRADIENT` of its gradient passes. The deviation divides by n - 1. RepPoints section 3.2.
    """
    # coordinates first: as maps lie in memory, sums over them run along it, several times faster
    pairs = points.movedim(-1, 0).unflatten(0, (-1, 2))
    count, middle = pairs.shape[0], pairs.mean(0)
    # torch's own deviation takes ten times as long on coordinates that are not side by side, as those of a map
    offset = pairs - middle
    variance = (offset * offset).mean(0) * (count / (count - 1))  # exported, a square would be a power
    least = torch.finfo(points.dtype).tiny  # a root of zero has no gradient; that of this number is exact
    deviation = variance.clamp(min=least).sqrt() - math.sqrt(least)
    factor = _slowed(transfer, MOMENT_GRADIENT).exp().view(-1, *(1,) * (points.ndim - 1))
    center, half = middle.flip(0), deviation.flip(0) * factor
    return torch.cat((center - half, center + half)).movedim(0, -1)


def kernel_cells(like: Tensor) -> Tensor:
    """(1, 18, 1, 1) where the cells of a plain kernel look: y, x from its middle, row by row."""
    steps = torch.arange(SIDE, device=like.device, dtype=like.dtype) - SIDE // 2
    pairs = torch.stack((steps.repeat_interleave(SIDE), steps.repeat(SIDE)), dim=-1)
    return pairs.view(1, COORDINATES, 1, 1)


def _slowed(x: Tensor, share: float) -> Tensor:
    """The same, of whose gradient a share passes."""
    return share * x + (1 - share) * x.detach()
