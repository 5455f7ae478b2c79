"""DDOD (Chen et al. 2021): classes and boxes disentangled, in what they answer for, where they look, and by level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yoloxkd.nn.assigners.atss import MIN_UNION, square_anchors
from yoloxkd.nn.assigners.ddod import TOPK, Order, ddod_matches
from yoloxkd.nn.assigners.match import Match, Positives, TwoMatches, dense_labels
from yoloxkd.nn.deform import SelfOffsetConv
from yoloxkd.nn.dense.atss import BOX_WEIGHT, decode
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import LEVELS, FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops.boxes import paired_iou
from yoloxkd.ops.losses import focal_loss, full_precision, giou_loss
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Targets, task_losses


class DDODConfig(FPNConfig):
    """Keys of DDOD."""

    order: Order = Field(
        "paper", description="paper: the best predictions inside a box; release: the best anywhere, then cut to the box"
    )


class LevelCounts(nn.Module):
    """Positives of each level since training began, of the classes and of the boxes: what its losses are weighted by.

    counts  (2, L) int64
    """

    averaged = ("counts",)

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, levels, dtype=torch.int64))
        self.counts: Tensor

    @torch.no_grad()
    def forward(self, match: TwoMatches, grid: Grid) -> Tensor:
        """The counts (2, L) with those of a batch. In training mode they are kept."""
        here = [torch.stack([m.fg[:, part].sum() for part in grid.slices()]) for m in (match, match.box)]
        counts = self.counts + torch.stack(here)
        if self.training:
            self.counts.copy_(counts)
        return counts


def level_weights(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Positives (..., L) of each level -> the factors of its losses (..., L): 2 for the fewest, 1 for the most."""
    least, most = counts.amin(-1, keepdim=True), counts.amax(-1, keepdim=True)
    return 2 - (counts - least).to(dtype) / ((most - least).to(dtype) + 1e-10)


class DDODHead(SharedHead):
    """The towers, whose first convolutions are deformable, and their three 3x3 predictors."""

    def __init__(self, cfg: DDODConfig, classes: int, levels: int) -> None:
        super().__init__(cfg, levels, bias=False)
        looking = [SelfOffsetConv(cfg.channels, cfg.channels, 3, bias=False) for _ in range(2)]
        for tower, conv in zip((self.cls_convs, self.reg_convs), looking, strict=True):
            tower[0].conv = conv
        self.atss_cls = nn.Conv2d(cfg.channels, classes, 3, padding=1)
        self.atss_reg = nn.Conv2d(cfg.channels, 4, 3, padding=1)
        self.atss_iou = nn.Conv2d(cfg.channels, 1, 3, padding=1)
        self.positives = LevelCounts(levels)
        self.initialize(self.atss_cls)
        for conv in looking:
            conv.look_straight()


class DDOD(FPNDetector):
    """DDOD on any timm backbone.

    Locations, anchors and box code are those of ATSS. `quality` is the logit of the overlap with the object's box.
    """

    Config = DDODConfig
    family = "ddod"
    quality = "localization"
    class_predictors = ("head.atss_cls.",)
    run_state = ("head.positives.",)

    cfg: DDODConfig
    head: DDODHead

    def __init__(self, cfg: DDODConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = DDODHead(cfg, len(names), len(LEVELS))

    offset = 0.0

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("anchors")

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head = self.head
        codes = [full_precision(scale(head.atss_reg(x))) for scale, x in zip(head.scales, reg, strict=True)]
        return Predictions([head.atss_cls(x) for x in cls], codes, [head.atss_iou(x) for x in reg])

    def anchors(self, grid: Grid) -> Tensor:
        return square_anchors(grid.points, grid.point_strides)

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        assert grid.anchors is not None
        return decode(raw, grid.anchors)

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> TwoMatches:
        """The match of the classes, with that of the boxes beside it."""
        classes, boxes = ddod_matches(out.grid, out.cls_logits, out.boxes, targets, order=self.cfg.order)
        return TwoMatches.beside(classes.leaving_out(targets, out.grid), boxes)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch, each location's times the weight of its level.

        cls  focal loss of every location and class, by the match of the classes. A location in an ignore region or in
             padding (`targets.ignore`, `targets.content`) that is not positive is left out
        box  2 (1 - GIoU), and iou: binary cross entropy of the quality with the overlap that the predicted box has, of the
             positives of the boxes
        Each is divided by the number of positives of its match, where an image without any counts as 1.
        """
        assert out.quality is not None
        assert isinstance(match, TwoMatches)
        with torch.autocast(out.quality.device.type, enabled=False):
            rows, found, wrong, entropy = ddod_terms(out, match, targets, self.head.positives)
            counts = [part.fg.sum(1).clamp(min=1).sum() for part in (match, match.box)]
            return task_losses(
                cls=Loss(rows.sum(), counts[0]),
                box=Loss(found.total(wrong), counts[1]),
                iou=Loss(found.total(entropy), counts[1]),
            )


def ddod_terms(
    out: DenseOutput, match: TwoMatches, targets: Targets, positives: LevelCounts
) -> tuple[Tensor, Positives, Tensor, Tensor]:
    """The losses of a batch, location by location, times their levels' weights and not yet divided.

    -> cls (B, A), the positives of the boxes in S slots, and box and iou (B, S) of these
    """
    assert out.quality is not None
    grid = out.grid
    rows = focal_loss(full_precision(out.cls_logits), dense_labels(match, targets), match.fg)
    levels = level_weights(positives(match, grid), rows.dtype).unbind(1)
    of_level = torch.cat(
        [w.unsqueeze(1).expand(2, s.stop - s.start) for w, s in zip(levels, grid.slices(), strict=True)], 1
    )
    rows = (rows * of_level[0]).masked_fill(match.ignored, 0)
    found = Positives.of(match.box, targets, grid, TOPK)
    predicted = decode(found.at(out.box_raw), square_anchors(found.points, found.strides))
    overlap = paired_iou(predicted.detach(), found.boxes, MIN_UNION)
    entropy = F.binary_cross_entropy_with_logits(found.at(out.quality), overlap, reduction="none")
    weight = of_level[1][found.cell]
    return rows, found, BOX_WEIGHT * giou_loss(predicted, found.boxes) * weight, entropy * weight
