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
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import LEVELS, FPNConfig
from yoloxkd.nn.dense.square_anchors import BOX_WEIGHT, SquareAnchorDetector, SquareAnchorHead, decode
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

    summed = ("counts",)

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(2, levels, dtype=torch.int64))
        self.counts: Tensor

    @torch.no_grad()
    def forward(self, match: TwoMatches, grid: Grid) -> tuple[Tensor, Tensor]:
        """The counts (2, L) before a batch, and those of the batch. In training mode these are added."""
        before = self.counts.clone()
        here = torch.stack([torch.stack([m.fg[:, part].sum() for part in grid.slices()]) for m in (match, match.box)])
        if self.training:
            self.counts.add_(here)
        return before, here


def level_weights(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Positives (..., L) of each level -> the factors of its losses (..., L): 2 for the fewest, 1 for the most."""
    least, most = counts.amin(-1, keepdim=True), counts.amax(-1, keepdim=True)
    return 2 - (counts - least).to(dtype) / ((most - least).to(dtype) + 1e-10)


class DDODHead(SquareAnchorHead):
    """With towers whose first convolutions are deformable, the predictor of the overlap, and the count of positives."""

    def __init__(self, cfg: DDODConfig, classes: int) -> None:
        super().__init__(cfg, classes, bias=False)
        offset_convs = [SelfOffsetConv(cfg.channels, cfg.channels, 3, bias=False) for _ in range(2)]
        for tower, conv in zip((self.cls_convs, self.reg_convs), offset_convs, strict=True):
            tower[0].conv = conv
        self.atss_iou = nn.Conv2d(cfg.channels, 1, 3, padding=1)
        self.positives = LevelCounts(len(LEVELS))
        self.initialize(self.atss_cls)
        for conv in offset_convs:
            conv.look_straight()


class DDOD(SquareAnchorDetector):
    """DDOD on any timm backbone. `quality` of the output is the logit of the overlap with the object's box."""

    Config = DDODConfig
    family = "ddod"
    reads_predictions = True
    run_state = ("head.positives.",)

    cfg: DDODConfig
    head: DDODHead

    def __init__(self, cfg: DDODConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = DDODHead(cfg, len(names))

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head = self.head
        return Predictions([head.atss_cls(x) for x in cls], head.codes(reg), [head.atss_iou(x) for x in reg])

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> TwoMatches:
        """The match of the classes, with that of the boxes beside it."""
        classes, boxes = ddod_matches(out.grid, out.cls_logits, out.boxes, targets, order=self.cfg.order)
        return TwoMatches.beside(classes.leaving_out(targets, out.grid), boxes)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch, each level's times its weight: by its positives since training began, the batch's included.

        cls  focal loss of every location and class, by the match of the classes. A location in an ignore region or in
             padding (`targets.ignore`, `targets.content`) that is not positive is left out
        box  2 (1 - GIoU), and iou: binary cross entropy of the quality with the overlap that the predicted box has, of the
             positives of the boxes
        Each is divided by the number of positives of its match, where an image without any counts as 1.
        """
        assert out.quality is not None
        assert isinstance(match, TwoMatches)
        with torch.autocast(out.quality.device.type, enabled=False):
            sums = ddod_terms(out, match, targets)
            before, here = self.head.positives(match, out.grid)
            images = [part.fg.sum(1).clamp(min=1).sum() for part in (match, match.box)]
            return task_losses(
                **{
                    name: by_level(sums[name], before[kind], here[kind], images[kind])
                    for name, kind in (("cls", 0), ("box", 1), ("iou", 1))
                }
            )


def by_level(sums: Tensor, before: Tensor, here: Tensor, positives: Tensor) -> Loss:
    """A loss of its sums (L,) over each level, the level's positives (L,) before and in the batch, and what it is divided by."""
    levels = len(sums)

    def of(whole: Tensor) -> Tensor:
        counts, totals, divisor = whole.split([levels, levels, 1])
        weights = level_weights(before + counts.detach().long(), totals.dtype)
        loss: Tensor = (weights * totals).sum() / divisor.squeeze()
        return loss

    finite = 1 + 0 * sums.detach().sum()  # sums that are not finite should be seen
    return Loss(finite, torch.cat((here.to(sums.dtype), sums, positives.to(sums.dtype).unsqueeze(0))), of=of)


def ddod_terms(out: DenseOutput, match: TwoMatches, targets: Targets) -> dict[str, Tensor]:
    """The losses of a batch summed over each level (L,), neither weighted nor divided."""
    assert out.quality is not None
    grid = out.grid
    rows = focal_loss(full_precision(out.cls_logits), dense_labels(match, targets), match.fg)
    rows = rows.masked_fill(match.ignored, 0)
    positives = Positives.of(match.box, targets, grid, TOPK)
    predicted = decode(positives.at(out.box_raw), square_anchors(positives.points, positives.strides))
    overlap = paired_iou(predicted.detach(), positives.boxes, MIN_UNION)
    entropy = F.binary_cross_entropy_with_logits(positives.at(out.quality), overlap, reduction="none")
    box_loss = BOX_WEIGHT * giou_loss(predicted, positives.boxes)
    of_level = [positives.used & (positives.strides == stride) for stride in grid.strides]
    return {
        "cls": torch.stack([rows[:, part].sum() for part in grid.slices()]),
        "box": torch.stack([box_loss.where(level, 0).sum() for level in of_level]),
        "iou": torch.stack([entropy.where(level, 0).sum() for level in of_level]),
    }
