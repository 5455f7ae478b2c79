"""Which cells of SOLO's grids answer for which object (Wang et al. 2020, section 3.3), and the masks that they should give."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.nn.assigners.match import Match
from yoloxkd.ops.constants import constant
from yoloxkd.types import Grid, Targets

REGION = 0.2
"""Sides of an object's center region relative to its box."""


@torch.no_grad()
def assign_cells(
    targets: Targets, grid: Grid, ranges: Sequence[tuple[float, float]], image_size: tuple[int, int]
) -> Match:
    """The object, the last among several, in whose center region a cell lies.

    An object takes part at the levels in whose range the square root of its box's area lies, both ends included, when it
    has a mask; its region lies around the center of mass, and reaches no further than the next cell.

    Args:
        targets: with masks
        grid: L levels of S x S cells over an input of `image_size` (H, W) px
        ranges: L x (low, high) px
    """
    masks = masks_of(targets)
    boxes = targets.boxes
    height, width = image_size
    number = masks.sum((2, 3)).to(boxes.dtype)
    center = torch.stack([_mean_index(masks.sum(2)), _mean_index(masks.sum(3))], -1).to(boxes.dtype)
    half = (boxes[..., 2:] - boxes[..., :2]) * (REGION / 2)
    side = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1).sqrt()
    frame = constant((width, height), boxes.dtype, boxes.device)
    rows = []
    for (low, high), (cells, _) in zip(ranges, grid.sizes, strict=True):
        used = targets.mask & (number > 0) & (side >= low) & (side <= high)
        middle, first, last = ((c / frame * cells).floor() for c in (center, center - half, center + half))
        first, last = (
            torch.maximum(first, middle - 1).clamp(min=0),
            torch.minimum(last, middle + 1).clamp(max=cells - 1),
        )
        at = torch.arange(cells, device=boxes.device, dtype=boxes.dtype)
        inside = (at >= first.unsqueeze(-1)) & (at <= last.unsqueeze(-1))  # (B, G, xy, S)
        covered = inside[:, :, 1, :, None] & inside[:, :, 0, None, :] & used[..., None, None]
        order = torch.arange(1, boxes.shape[1] + 1, device=boxes.device).view(1, -1, 1, 1)
        owner = (covered * order).amax(1) if boxes.shape[1] else boxes.new_zeros(len(boxes), cells, cells).long()
        rows.append(owner.flatten(1) - 1)
    gt = torch.cat(rows, 1)
    return Match.of(gt >= 0, gt).leaving_out(targets, grid)


def masks_of(targets: Targets) -> Tensor:
    """The masks of targets. UserError: there are none."""
    if targets.masks is None:
        raise UserError(
            "SOLO learns from masks, and the data has none; give a data set with them, or choose a detector of boxes"
        )
    return targets.masks


def _mean_index(count: Tensor) -> Tensor:
    """(B, G) the mean index of pixels of which there are `count` (B, G, N) at each."""
    index = torch.arange(count.shape[-1], device=count.device, dtype=torch.float64)
    number = count.to(torch.float64)
    return (number * index).sum(-1) / number.sum(-1).clamp(min=1)


def shrunk(masks: Tensor, factor: int) -> Tensor:
    """Masks (..., H, W) bool at one `factor`-th, an even number, of the size: half of the four pixels around a block's center."""
    low, high = factor // 2 - 1, factor // 2
    corners = [masks[..., y::factor, x::factor] for y in (low, high) for x in (low, high)]
    return torch.stack([corner.to(torch.uint8) for corner in corners]).sum(0, dtype=torch.uint8) >= 2
