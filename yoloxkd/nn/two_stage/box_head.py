"""The second stage (Faster R-CNN, Ren et al. 2015): class and box of a region from its pooled features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.two_stage.box_code import encode
from yoloxkd.nn.two_stage.conv_blocks import conv_blocks
from yoloxkd.nn.two_stage.rpn import rows_of
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Loss, Targets

Four = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class StageRule:
    """How a stage trains, and what its box code means.

    iou             from which a region is positive, and below which it is background
    stds            standard deviations of the box code
    weight          of both losses
    low_quality     a box's best region is positive too, if it overlaps it by `iou`
    samples         regions of an image, at most `positive_share` of them positive
    agnostic        one box for all classes
    beta            of the smooth L1 loss; 0: L1
    """

    iou: float = 0.5
    stds: Four = (0.1, 0.1, 0.2, 0.2)
    weight: float = 1.0
    low_quality: bool = False
    samples: int = 512
    positive_share: float = 0.25
    agnostic: bool = False
    beta: float = 0.0


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a box head is made of: `layers` fully connected ones of width `hidden`, after `convs` 3x3 convolutions.

    norm    batch norm behind the convolutions
    """

    hidden: int = 1024
    layers: int = 2
    convs: int = 0
    norm: bool = False


class BoxHead(nn.Module):
    """Fully connected layers and two predictors; attributes as mmdetection's keys, the background class last.

    channels of the pooled maps, `size` cells a side
    """

    def __init__(self, channels: int, size: int, form: HeadForm, classes: int, *, agnostic: bool = False) -> None:
        super().__init__()
        hidden = form.hidden
        self.shared_convs = conv_blocks(channels, channels, form.convs, norm=form.norm)
        input_widths = [channels * size * size, *[hidden] * (form.layers - 1)]
        self.shared_fcs = nn.ModuleList(nn.Linear(width, hidden) for width in input_widths)
        self.fc_cls = nn.Linear(hidden, classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 if agnostic else 4 * classes)
        for layer in self.shared_fcs:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (*self.shared_fcs, self.fc_cls, self.fc_reg):
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, C, s, s) -> class logits (B, P, K + 1) and box code (B, P, 4 K), or (B, P, 4)."""
        x = pooled
        if len(self.shared_convs):
            x = x.flatten(0, 1)
            for block in self.shared_convs:
                x = block(x)
            x = x.unflatten(0, pooled.shape[:2])
        x = x.flatten(2)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x), self.fc_reg(x)


def of_class(code: Tensor, labels: Tensor) -> Tensor:
    """The box code of one class a region: (B, P, 4 K) or, the same for all, (B, P, 4); labels (B, P) -> (B, P, 4)."""
    if code.shape[-1] == 4:
        return code
    by_class: Tensor = code.unflatten(-1, (-1, 4))
    return by_class.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)


def stage_losses(
    logits: Tensor, code: Tensor, regions: Tensor, targets: Targets, match: Match, rule: StageRule
) -> tuple[Loss, Loss]:
    """Cross entropy of all regions, and smooth L1 of the positives' own class; both divided by the number of all regions.

    logits (B, S, K + 1) and code (B, S, 4 K) or (B, S, 4) of regions (B, S, 4) px; match over them, ignored ones are left out
    """
    logits, code, regions = full_precision(logits), full_precision(code), full_precision(regions)
    used = ~match.ignored
    labels = class_of(match, targets, logits.shape[-1] - 1)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    class_code = of_class(code, labels.clamp(max=logits.shape[-1] - 2))
    target_code = encode(regions, rows_of(targets.boxes, match.gt).to(regions.dtype), rule.stds)
    target_code = torch.where(match.fg.unsqueeze(-1), target_code, class_code.detach())
    error = F.smooth_l1_loss(class_code, target_code, reduction="sum", beta=rule.beta)
    count = used.sum()
    entropy = entropy.masked_fill(~used, 0).sum()
    return Loss(entropy * rule.weight, count), Loss(error * rule.weight, count)


def class_of(match: Match, targets: Targets, background: int) -> Tensor:
    """(B, S) int64 class that each region should have."""
    if targets.labels.shape[1] == 0:
        return torch.full_like(match.gt, background)
    return torch.where(match.fg, targets.labels.gather(1, match.gt.clamp(min=0)), background)
