"""FCOS assigner: positives by position and size (Tian et al. 2019, improved version)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, image_parts, no_match
from yoloxkd.ops.boxes import area, to_distances
from yoloxkd.ops.constants import constant
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Grid, Targets

RADIUS = 1.5
"""Half side of the region around a box's center, in strides of the level."""
RANGES = ((-1.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, 1e8))
"""px, the largest distance to a side that a level answers for, finest first; both ends included."""


@torch.no_grad()
def fcos_match(
    grid: Grid,
    targets: Targets,
    *,
    radius: float | None = RADIUS,
    ranges: Sequence[tuple[float, float]] = RANGES,
    budget: int | None = None,
) -> Match:
    """Match locations to boxes.

    Reads boxes and mask of `targets`.
    radius  None: the whole box instead of its center region
    ranges  L x (low, high)
    A location is positive for a box when it lies strictly inside the center region, cut to the box, and its largest
    distance to the four sides is in its level's range. Among several boxes it takes the smallest, the lower row first.
    """
    points, images, rows = grid.points, *targets.mask.shape
    if rows == 0:
        return no_match(images, points.shape[0], points.device)
    cells = constant(tuple(part.stop - part.start for part in grid.slices()), torch.int64, points.device)
    limits = constant(tuple(map(tuple, ranges)), full_precision(targets.boxes).dtype, points.device)
    limits = limits.repeat_interleave(cells, dim=0, output_size=points.shape[0])
    parts = []
    for part in image_parts(images, rows * points.shape[0], points.device, budget):
        boxes = full_precision(targets.boxes[part]).unsqueeze(2)
        positive = _inside(points, grid.point_strides, boxes, radius)
        furthest = to_distances(points, boxes).amax(-1)
        positive &= (furthest >= limits[:, 0]) & (furthest <= limits[:, 1]) & targets.mask[part].unsqueeze(2)
        size = torch.where(positive, area(boxes), torch.inf)
        least, row = size.min(dim=1)
        fg = least < torch.inf
        parts.append(Match.of(fg, torch.where(fg, row, -1)))
    return Match.joined(parts)


def _inside(points: Tensor, strides: Tensor, boxes: Tensor, radius: float | None) -> Tensor:
    """Points (A, 2) strictly inside (the center regions of) boxes (B, G, 1, 4): (B, G, A) bool."""
    if radius is None:
        return to_distances(points, boxes).amin(-1) > 0
    low, high = boxes[..., :2], boxes[..., 2:]
    center, reach = (low + high) / 2, (strides * radius).unsqueeze(-1)
    region = torch.cat((torch.maximum(center - reach, low), torch.minimum(center + reach, high)), dim=-1)
    return to_distances(points, region).amin(-1) > 0
