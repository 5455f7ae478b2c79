"""Instance masks of regions (Mask R-CNN, He et al. 2017): the head, its targets and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.nn.assigners.match import image_parts
from yoloxkd.nn.two_stage.box_code import clip
from yoloxkd.nn.two_stage.conv_blocks import conv_blocks
from yoloxkd.ops.constants import constant
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Loss, Targets

THRESHOLD = 0.5
"""Part of a target cell from which it belongs to the mask."""
BUDGET = 2**26
"""Pixels of bitmaps that are floats at once; a larger batch is taken a few images at a time."""


class MaskHead(nn.Module):
    """Convolutions, a transposed convolution that doubles the size, and one channel a class; attributes as mmdetection's keys.

    channels: of the pooled maps; hidden: of the head; norm: batch norm behind the convolutions
    """

    def __init__(self, channels: int, classes: int, *, hidden: int = 256, convs: int = 4, norm: bool = False) -> None:
        super().__init__()
        self.convs = conv_blocks(channels, hidden, convs, norm=norm)
        self.upsample = nn.ConvTranspose2d(hidden, hidden, 2, stride=2)
        self.conv_logits = nn.Conv2d(hidden, classes, 1)
        for layer in (self.upsample, self.conv_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, C, s, s) -> logits (N, K, 2 s, 2 s)."""
        for block in self.convs:
            pooled = block(pooled)
        y: Tensor = self.conv_logits(F.relu(self.upsample(pooled)))
        return y


@torch.no_grad()
def mask_targets(masks: Tensor, rows: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What the mask of each region should be: RoIAlign of the object's bitmap at scale 1, at least a half.

    Args:
        masks: (M, H, W) 0 or 1, bitmaps of the objects of a batch
        rows: (N,) int64, the bitmap that each region answers for
        boxes: (N, 4) px, the regions; they are cut at the bitmap
        size: cells of a side
    Returns:
        (N, size, size) bool
    """
    from torchvision.ops import roi_align

    boxes = full_precision(boxes)
    height, width = masks.shape[-2:]
    cut = clip(boxes[None], constant(((width, height),), boxes.dtype, boxes.device))[0]
    rois = torch.cat((rows.to(boxes.dtype).unsqueeze(-1), cut), 1)
    soft: Tensor = roi_align(masks.to(boxes.dtype).unsqueeze(1), rois, size, 1.0, 0, True)
    return soft[:, 0] >= THRESHOLD


@torch.no_grad()
def sampled_targets(targets: Targets, rows: Tensor, boxes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mask targets of sampled regions, and which of them have one: no more bitmaps than `BUDGET` allows are floats at once.

    Args:
        targets: with or without masks
        rows: (B, S) int64, the row of `targets` that each region answers for, -1: none
        boxes: (B, S, 4) px
        size: cells of a side
    Returns:
        (B, S, size, size) bool, (B, S) bool
    """
    masks = targets.masks
    if masks is None or masks.shape[1] == 0:
        return rows.new_zeros(*rows.shape, size, size, dtype=torch.bool), torch.zeros_like(rows, dtype=torch.bool)
    count = masks.shape[1]
    used = (rows >= 0) & masks.flatten(2).any(2).gather(1, rows.clamp(min=0))
    parts = []
    for part in image_parts(len(masks), masks[0].numel(), masks.device, BUDGET):
        some = masks[part]
        first = torch.arange(len(some), device=rows.device).unsqueeze(1) * count
        at = (rows[part].clamp(min=0) + first).flatten()
        parts.append(mask_targets(some.flatten(0, 1), at, boxes[part].flatten(0, 1), size))
    return torch.cat(parts).unflatten(0, rows.shape), used


def class_channel(logits: Tensor, labels: Tensor) -> Tensor:
    """(N, K, s, s) of each region's own class: (N, s, s)."""
    index = labels.view(-1, 1, 1, 1).expand(-1, 1, *logits.shape[2:])
    return logits.gather(1, index).squeeze(1)


def mask_loss(logits: Tensor, labels: Tensor, targets: Tensor, used: Tensor) -> Loss:
    """Binary cross entropy of the own class's channel, mean over the cells of the regions in use.

    logits (N, K, s, s), labels (N,) int64, targets (N, s, s) bool, used (N,) bool
    """
    channel = class_channel(full_precision(logits), labels)
    entropy = F.binary_cross_entropy_with_logits(channel, targets.to(channel.dtype), reduction="none").mean((1, 2))
    return Loss(entropy.masked_fill(~used, 0).sum(), used.sum())
