"""The region proposal network (Faster R-CNN, Ren et al. 2015): objectness and a box of every anchor of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.assigners.max_iou import max_iou_match
from yoloxkd.nn.dense.dense_detector import flat
from yoloxkd.nn.two_stage.anchors import grid_anchors
from yoloxkd.nn.two_stage.box_code import decode, encode
from yoloxkd.nn.two_stage.conv_blocks import conv_blocks
from yoloxkd.nn.two_stage.sampling import sample
from yoloxkd.ops.constants import constant
from yoloxkd.ops.losses import full_precision
from yoloxkd.ops.points import compact, grid_of
from yoloxkd.types import DenseOutput, Loss, Losses, Targets, task_losses

STRIDES = (4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class RPNRule:
    """How the proposal network trains.

    positive, negative, low_quality   IoU, see `max_iou_match`
    samples                           anchors of an image, at most `positive_share` of them positive
    beta                              of the smooth L1 loss; 0: L1
    inside                            anchors that reach beyond the image take no part
    """

    positive: float = 0.7
    negative: float = 0.3
    low_quality: float = 0.3
    samples: int = 256
    positive_share: float = 0.5
    beta: float = 0.0
    inside: bool = False


class RPN(nn.Module):
    """One or more 3x3 convolutions, and the two 1x1 predictors, shared by all levels; attributes as mmdetection's keys.

    scale    side of an anchor in strides; ratios: height over width of a cell's anchors
    strides  of the levels; sides: px, of a cell's anchors at every level instead of the scale, each with every ratio
    rounded  anchors have whole px (torchvision)
    convs    3x3 convolutions; one of them is `rpn_conv` itself
    """

    def __init__(
        self,
        channels: int,
        scale: float = 8.0,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        *,
        strides: Sequence[int] = STRIDES,
        sides: Sequence[float] = (),
        rounded: bool = False,
        convs: int = 1,
    ) -> None:
        super().__init__()
        self.scale, self.ratios, self.rounded = scale, tuple(ratios), rounded
        self.strides, self.sides = tuple(strides), tuple(sides)
        self.anchors = len(self.ratios) * max(1, len(self.sides))
        several = nn.Sequential(*conv_blocks(channels, channels, convs))
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1) if convs == 1 else several
        self.rpn_cls = nn.Conv2d(channels, self.anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * self.anchors, 1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=0.01)
                nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, maps: Sequence[Tensor], image_size: tuple[int, int]) -> DenseOutput:
        """Maps L x (B, C, h, w) of these strides of an input of image_size (H, W) px."""
        hidden = [F.relu(self.rpn_conv(x)) for x in maps]
        logits, deltas = [self.rpn_cls(x) for x in hidden], [self.rpn_reg(x) for x in hidden]
        return self.output(logits, deltas, image_size)

    def output(self, logits: Sequence[Tensor], deltas: Sequence[Tensor], image_size: tuple[int, int]) -> DenseOutput:
        """Predictions L x (B, n, h, w) and L x (B, 4 n, h, w), n anchors a cell, as an output without maps; its boxes have no gradient."""
        sizes = [(m.shape[2], m.shape[3]) for m in logits]
        grid = grid_of(sizes, self.strides, logits[0].device, 0.0, self.anchors)
        raw = flat(deltas, self.anchors)
        with torch.no_grad():
            code = full_precision(raw)
            grid.anchors = grid_anchors(
                grid, self.scale, self.ratios, code.dtype, rounded=self.rounded, sides=self.sides
            )
            boxes = decode(grid.anchors, code)
        return DenseOutput((), (), (), (), flat(logits, self.anchors), raw, boxes, None, grid, image_size)


def assign_anchors(out: DenseOutput, targets: Targets, rule: RPNRule, keys: Tensor | None) -> Match:
    """Who answers for what among the anchors, sampled by the random keys (B, A); None: all of them train."""
    assert out.grid.anchors is not None
    anchors = out.grid.anchors
    inside = None
    if rule.inside:
        limit = areas(out, targets)[:, None]
        inside = (anchors[:, :2] >= 0).all(-1) & (anchors[:, 2:] < limit).all(-1)
    match = max_iou_match(
        anchors, targets, positive=rule.positive, negative=rule.negative, claim=rule.low_quality, usable=inside
    ).leaving_out(targets, out.grid)
    return match if keys is None else sample(match, rule.samples, rule.positive_share, keys)


def areas(out: DenseOutput, targets: Targets) -> Tensor:
    """(B, 2) right and lower edge of each image, px."""
    if targets.content is not None:
        return targets.content[:, 2:]
    height, width = out.image_size
    return constant(((width, height),), out.grid.points.dtype, out.grid.points.device).expand(len(targets.mask), 2)


def rpn_losses(out: DenseOutput, targets: Targets, match: Match, rule: RPNRule) -> Losses:
    """Losses of the sampled anchors, both divided by their number; an image's positives, and its background, count as at least 1.

    rpn/cls  binary cross entropy of the objectness
    rpn/box  smooth L1 of the box code of positives
    """
    assert out.grid.anchors is not None
    with torch.autocast(out.cls_logits.device.type, enabled=False):
        logits = full_precision(out.cls_logits)[..., 0]
        entropy = F.binary_cross_entropy_with_logits(logits, match.fg.to(logits.dtype), reduction="none")
        slots = min(match.fg.shape[1], int(rule.samples * rule.positive_share))
        cell, used = compact(match.fg, slots)
        code = full_precision(out.box_raw.gather(1, cell.unsqueeze(-1).expand(-1, -1, 4)))
        target_code = encode(out.grid.anchors[cell], rows_of(targets.boxes, match.gt.gather(1, cell)).to(code.dtype))
        target_code = torch.where(used.unsqueeze(-1), target_code, code.detach())
        error = F.smooth_l1_loss(code, target_code, reduction="sum", beta=rule.beta)
        positives, background = match.fg.sum(1), (~match.fg & ~match.ignored).sum(1)
        count = (positives.clamp(min=1) + background.clamp(min=1)).sum()
        return task_losses(
            **{"rpn/cls": Loss(entropy.masked_fill(match.ignored, 0).sum(), count), "rpn/box": Loss(error, count)}
        )


def rows_of(boxes: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, S) int64 of boxes (B, G, 4); zero where the row is negative."""
    if boxes.shape[1] == 0:
        return boxes.new_zeros(*rows.shape, 4)
    row_boxes = boxes.gather(1, rows.clamp(min=0).unsqueeze(-1).expand(-1, -1, 4))
    return row_boxes.masked_fill((rows < 0).unsqueeze(-1), 0)
