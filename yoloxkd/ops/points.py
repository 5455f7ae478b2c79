"""Grids of feature levels, and masks over their locations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yoloxkd.ops import devices
from yoloxkd.ops.constants import constant
from yoloxkd.types import Grid


def grid_of(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    device: torch.device,
    offset: float = 0.5,
    per_cell: int = 1,
    steps: Sequence[tuple[float, float]] | None = None,
) -> Grid:
    """The grid of levels of sizes L x (h, w) in cells and strides L in px, without anchors; points are float32.

    offset  0.5 is a cell's center, 0 its corner
    steps   L x (y, x) px from cell to cell; None: the stride
    """
    points, per_point = [], []
    for (h, w), stride, (down, right) in zip(sizes, strides, steps or [(s, s) for s in strides], strict=True):
        y = (torch.arange(h, device=device, dtype=torch.float32) + offset) * down
        x = (torch.arange(w, device=device, dtype=torch.float32) + offset) * right
        grid = torch.stack((x.expand(h, w), y.unsqueeze(1).expand(h, w)), dim=-1)
        points.append(grid.reshape(-1, 2))
        per_point.append(torch.full((h * w * per_cell,), stride, device=device, dtype=torch.float32))
    where = torch.cat(points)
    if per_cell > 1:
        where = where.repeat_interleave(per_cell, 0)
    return Grid(
        tuple(sizes),
        tuple(strides),
        where,
        torch.cat(per_point),
        per_cell=per_cell,
        offset=offset,
        steps=None if steps is None else tuple(steps),
    )


def compact(mask: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Where the true entries of each row are, in a fixed number of slots: boolean indexing without its host sync.

    mask (B, A) bool, at most `slots` true entries a row (more are dropped, last first)
    -> cells (B, slots) int64, indices into A in ascending order (0 in unused slots), and used (B, slots) bool.
    """
    images, length = mask.shape
    rank = mask.cumsum(dim=1)
    target = torch.where(mask & (rank <= slots), rank - 1, slots)
    index = torch.arange(length, device=mask.device).expand(images, length)
    cells = torch.zeros(images, slots + 1, dtype=torch.int64, device=mask.device).scatter_(1, target, index)[:, :slots]
    used = torch.arange(slots, device=mask.device) < rank[:, -1:]
    return torch.where(used, cells, 0), used


def centers_inside(boxes: Tensor, valid: Tensor, grid: Grid) -> Tensor:
    """Which predictions of a grid lie inside at least one of an image's boxes, borders included.

    boxes (B, G, 4) xyxy px, valid (B, G) bool -> (B, A) bool.
    A box covers a rectangle of cells, so each level is one summed-area table: the cost grows with A + G, not A * G.
    """
    if devices.may_read(boxes.device) and not valid.any():
        return valid.new_zeros(len(valid), len(grid.points))
    inside, offset = [], grid.offset
    for (h, w), (down, right) in zip(grid.sizes, grid.steps or [(s, s) for s in grid.strides], strict=True):
        step = constant((right, down), boxes.dtype, boxes.device)
        low = torch.ceil(boxes[..., :2] / step - offset)
        high = torch.floor(boxes[..., 2:] / step - offset) + 1
        limit = constant((w, h), boxes.dtype, boxes.device)
        low = torch.minimum(low.clamp(min=0), limit).long()
        high = torch.minimum(high.clamp(min=0), limit).long()
        x1, y1, x2, y2 = *low.unbind(-1), *high.unbind(-1)
        one = (valid & (x2 > x1) & (y2 > y1)).int()
        corners = torch.cat((y1 * (w + 1) + x1, y1 * (w + 1) + x2, y2 * (w + 1) + x1, y2 * (w + 1) + x2), dim=1)
        table = torch.zeros(boxes.shape[0], (h + 1) * (w + 1), dtype=torch.int32, device=boxes.device)
        table.scatter_add_(1, corners, torch.cat((one, -one, -one, one), dim=1))
        covered = table.view(-1, h + 1, w + 1).cumsum(1).cumsum(2)[:, :h, :w] > 0
        inside.append(covered.flatten(1))
    cells = torch.cat(inside, dim=1)
    return cells if grid.per_cell == 1 else cells.repeat_interleave(grid.per_cell, 1)


def within_content(points: Tensor, content: Tensor) -> Tensor:
    """(A, 2) points, (B, 4) image area -> (B, A) bool; the left and top edge belong to the image."""
    x, y = points[:, 0], points[:, 1]
    return (x >= content[:, 0:1]) & (y >= content[:, 1:2]) & (x < content[:, 2:3]) & (y < content[:, 3:4])
