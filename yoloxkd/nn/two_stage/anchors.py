"""Anchors of a feature pyramid: boxes of one area and several aspect ratios at every cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()
    half = torch.stack((side / root, side * root), dim=-1) / 2
    anchors = torch.cat((-half, half), dim=-1)
    return anchors.round() if rounded else anchors


def grid_anchors(
    grid: Grid, scale: float, ratios: Sequence[float], dtype: torch.dtype = torch.float32, *, rounded: bool = False
) -> Tensor:
    """Anchors of side `scale` strides at every cell of a grid with one prediction for each ratio: (A, 4) px."""
    shapes = []
    for (h, w), stride in zip(grid.sizes, grid.strides, strict=True):
        shapes.append(cell_anchors(scale * stride, ratios, rounded=rounded).repeat(h * w, 1))
    shape = torch.cat(shapes).to(grid.points.device, dtype)
    return grid.points.to(dtype).repeat(1, 2) + shape
