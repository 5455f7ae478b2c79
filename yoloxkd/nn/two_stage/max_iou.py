"""The assignment of regions to the boxes that they overlap most (Faster R-CNN, Ren et al. 2015, section 3.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, image_parts, no_match
from yoloxkd.ops.boxes import area, pairwise_iou

COVERED = 0.5
"""A region of which ignore regions cover this share, and that is not positive, is no background."""


@torch.no_grad()
def max_iou(
    regions: Tensor,
    boxes: Tensor,
    valid: Tensor,
    *,
    positive: float,
    negative: float,
    low_quality: float | None = None,
    inside: Tensor | None = None,
    budget: int | None = None,
) -> Match:
    """Assign every region to the box that it overlaps most.

    Args:
        regions: (R, 4) px, the same in every image, or (B, R, 4)
        boxes: (B, G, 4) px; valid: (B, G) bool, rows that hold a box
        positive: IoU from which a region answers for a box; negative: below which it is background; between: ignored
        low_quality: the regions that overlap a box most answer for it whatever else they overlap, if that IoU is at
            least this; of several such boxes the last counts. None: only `positive` decides
        inside: (B, R) bool, regions that take part; the others are ignored
        budget: pairs of boxes and regions looked at in one go
    Returns:
        Match over the R regions; its `score` is a region's largest IoU
    """
    images, rows = valid.shape
    count = regions.shape[-2]
    if inside is None:
        inside = torch.ones(images, count, dtype=torch.bool, device=boxes.device)
    if rows == 0:
        match = no_match(images, count, boxes.device)
        return Match(match.fg, match.gt, ~inside, boxes.new_zeros(images, count))
    parts = []
    for part in image_parts(images, rows * count, boxes.device, budget):
        some = regions if regions.ndim == 2 else regions[part]
        overlap = pairwise_iou(boxes[part], some)
        takes_part = valid[part].unsqueeze(-1) & inside[part].unsqueeze(1)
        parts.append(_match(overlap.masked_fill_(~takes_part, -1), positive, negative, low_quality))
    match = Match.joined(parts)
    match.ignored |= ~inside
    return match


def _match(overlap: Tensor, positive: float, negative: float, low_quality: float | None) -> Match:
    """overlap (B, G, R), -1 for a pair that does not take part."""
    best, row = overlap.max(dim=1)
    fg = best >= positive
    gt = torch.where(fg, row, -1)
    if low_quality is not None:
        of_box = overlap.amax(dim=2, keepdim=True)
        tied = (overlap == of_box) & (of_box >= low_quality)
        order = torch.arange(1, overlap.shape[1] + 1, device=overlap.device, dtype=torch.int32)
        last = (tied * order[:, None]).amax(dim=1).long() - 1
        gt = torch.where(last >= 0, last, gt)
        fg = gt >= 0
    return Match(fg, gt, (best >= negative) & ~fg, best.clamp(min=0))


def covered(regions: Tensor, boxes: Tensor, ignore: Tensor) -> Tensor:
    """Whether an ignore region covers at least half of a region: (B, R, 4) px, (B, G, 4) px, (B, G) bool -> (B, R) bool."""
    if ignore.shape[1] == 0:
        return torch.zeros(regions.shape[:2], dtype=torch.bool, device=regions.device)
    low = torch.maximum(regions[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(regions[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1).masked_fill(~ignore.unsqueeze(1), 0).amax(-1)
    return shared >= COVERED * area(regions).clamp(min=1e-6)
