"""Anchors of a feature pyramid: boxes of one area and several aspect ratios at every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from yoloxkd.ops.constants import constant
from yoloxkd.types import Grid


def cell_anchors(side: float, ratios: Sequence[float], *, rounded: bool = False) -> Tensor:
    """Anchors around the origin.

    Args:
        side: square root of their area, px
        ratios: height over width
        rounded: to whole px (torchvision)
    Returns:
        (ratios, 4) float64 xyxy px
    """
    return torch.tensor(_corners((side,), ratios, rounded), dtype=torch.float64)


def _corners(sides: Sequence[float], ratios: Sequence[float], rounded: bool) -> tuple[tuple[float, ...], ...]:
    """All sides of the first ratio, then those of the next."""
    halves = [(side / math.sqrt(ratio) / 2, side * math.sqrt(ratio) / 2) for ratio in ratios for side in sides]
    corners = [(-w, -h, w, h) for w, h in halves]
    return tuple(tuple(float(round(x)) if rounded else x for x in corner) for corner in corners)


def grid_anchors(
    grid: Grid,
    scale: float,
    ratios: Sequence[float],
    dtype: torch.dtype = torch.float32,
    *,
    rounded: bool = False,
    sides: Sequence[float] = (),
) -> Tensor:
    """Anchors at every cell of a grid, one a prediction: (A, 4) px. Their side is `scale` strides, or each of `sides` px."""
    shapes = []
    for (h, w), stride in zip(grid.sizes, grid.strides, strict=True):
        corners = constant(_corners(sides or (scale * stride,), ratios, rounded), dtype, grid.points.device)
        shapes.append(corners.repeat(h * w, 1))
    return grid.points.to(dtype).repeat(1, 2) + torch.cat(shapes)
