"""Positives by place and size: the one location that is nearest to a box, on its level (RepPoints, Yang et al. 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, match_claims, no_match
from yoloxkd.ops.boxes import to_center
from yoloxkd.ops.constants import constant
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Grid, Targets

SCALE = 4
"""Geometric mean of the sides, in strides, of a box that belongs to a level for certain."""


@torch.no_grad()
def nearest_point_match(grid: Grid, targets: Targets, *, area: Tensor | None = None) -> Match:
    """Match each box to the nearest location of its level; reads boxes and mask of `targets`.

    area  (B, 2) height and width px of each image inside the batch; locations beyond it take no part. None:
          `targets.content` says it, where it is given

    The level is that of stride 2^floor(log2(sqrt(w h) / 4)), or the nearest there is. Distance is measured in widths and
    heights of the box. A location nearest to several boxes takes the one it is nearest to, the lower row among equals; the
    others get none. Neither time nor memory grows with the number of boxes times that of locations.
    """
    images, rows = targets.mask.shape
    locations, device = grid.points.shape[0], grid.points.device
    if rows == 0:
        return no_match(images, locations, device)
    center, side = to_center(full_precision(targets.boxes)).split(2, dim=-1)
    side = side.clamp(min=1e-6)
    strides = constant(grid.strides, side.dtype, device)
    # int() of the release rounds towards zero, which matters below the finest level only
    level = (side / SCALE).log2().sum(-1).div(2).floor()
    level = (level - strides[0].log2()).clamp(0, len(grid.strides) - 1).long()
    stride = strides[level].unsqueeze(-1)
    # of a level: columns and rows of cells, and where its locations begin
    shape = constant(tuple((w, h) for h, w in grid.sizes), torch.int64, device)[level]
    start = constant(tuple(part.start for part in grid.slices()), torch.int64, device)[level]
    extent = _extent(targets, area, shape * stride).to(side.dtype)
    last = torch.minimum((extent / stride - grid.offset).ceil().long(), shape) - 1
    # of two places equally near the lower one: ceil(x - 0.5)
    cell = torch.minimum((center / stride - grid.offset - 0.5).ceil().long(), last).clamp(min=0)
    where = start + cell[..., 1] * shape[..., 0] + cell[..., 0]
    squared_distance = (((cell + grid.offset) * stride - center) / side).square().sum(-1)
    real = targets.mask & (last >= 0).all(-1)
    return match_claims(where.unsqueeze(-1), -squared_distance.unsqueeze(-1), real.unsqueeze(-1), locations)


def _extent(targets: Targets, area: Tensor | None, whole: Tensor) -> Tensor:
    """(B, G, 2) width and height px that locations lie within."""
    if area is not None:
        return area.flip(-1).unsqueeze(1).expand_as(whole)
    return whole if targets.content is None else targets.content[:, None, 2:].expand_as(whole)
