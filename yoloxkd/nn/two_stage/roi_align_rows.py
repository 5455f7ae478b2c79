"""RoIAlign on a CPU, as sums of map cells with their channels side by side.

torchvision's kernel goes through one channel after the other. Here each cell of a region is a weighted sum of rows of the
map, one row a location: a multiplication with a sparse matrix, whose transpose makes the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

AT_ONCE = 2**18
"""Entries of the sparse matrix worked on in one go."""


class _RoIAlign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rois: Tensor, size: int, scale: float, sampling: int, aligned: bool) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.form = x.shape, size, scale, sampling, aligned
        locations = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).contiguous()
        out = x.new_zeros(len(rois), x.shape[1], size, size)
        for some, cells, weights in _entries(rois, *ctx.form):
            rows = F.embedding_bag(cells, locations, mode="sum", per_sample_weights=weights)
            out[some] = rows.view(len(some), size, size, -1).permute(0, 3, 1, 2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rois,), (images, channels, height, width) = ctx.saved_tensors, ctx.form[0]
        to_locations = grads[0].new_zeros(images * height * width, channels)
        for some, cells, weights in _entries(rois, *ctx.form):
            rows = grads[0][some].permute(0, 2, 3, 1).reshape(-1, channels)
            number = torch.arange(len(rows)).repeat_interleave(cells.shape[1])
            matrix = torch.sparse_coo_tensor(
                torch.stack((cells.flatten(), number)), weights.flatten(), (len(to_locations), len(rows)),
                check_invariants=False,
            )  # fmt: skip
            to_locations.addmm_(matrix, rows)
        to_x = to_locations.view(images, height, width, channels).permute(0, 3, 1, 2).contiguous()
        return to_x, None, None, None, None, None


def roi_align_rows(x: Tensor, rois: Tensor, size: int, scale: float, sampling: int, aligned: bool) -> Tensor:
    """What `torchvision.ops.roi_align` gives, with a gradient for the map alone.

    Args:
        x: (B, C, h, w) float32 or float64, on the CPU
        rois: (N, 5) image and px
        size: cells of a region's side
        scale: cells of the map a px
        sampling: points a cell and direction; 0: as many as the cell has pixels of the map, rounded up
        aligned: pixel centers lie half a cell from the map's corner
    Returns:
        (N, C, size, size)
    """
    pooled: Tensor = _RoIAlign.apply(x, rois, size, scale, sampling, aligned)
    return pooled


def _entries(
    rois: Tensor, shape: torch.Size, size: int, scale: float, sampling: int, aligned: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Which regions (n,), and the locations of all maps (n * size * size, E) that their cells are made of, with weights.

    Regions of as many points go together. Those without any, and those that are not finite, are left out: they are zero.
    """
    height, width = shape[2:]
    low, high = (rois[:, 1:] * scale - 0.5 * aligned).split(2, 1)
    extent = high - low if aligned else (high - low).clamp(min=1)
    points = torch.full_like(extent, sampling) if sampling else (extent / size).ceil()
    points = points.masked_fill(~rois.isfinite().all(1, keepdim=True), 0).long()  # of a training that diverges
    for kind in points[(points > 0).all(1)].unique(dim=0):
        along_x, along_y = kind.tolist()
        step = max(1, AT_ONCE // (size * size * 4 * along_x * along_y))
        for some in (points == kind).all(1).nonzero().squeeze(1).split(step):
            x_cells, x_weights = _along(low[some, 0], extent[some, 0], width, size, along_x)
            y_cells, y_weights = _along(low[some, 1], extent[some, 1], height, size, along_y)
            first = rois[some, 0].long().view(-1, 1, 1, 1, 1) * height
            cells = (first + y_cells[:, :, None, :, None]) * width + x_cells[:, None, :, None, :]
            weights = y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]
            yield some, cells.view(len(some) * size * size, -1), weights.reshape(len(some) * size * size, -1)


def _along(low: Tensor, extent: Tensor, length: int, size: int, points: int) -> tuple[Tensor, Tensor]:
    """Along one axis, of regions (n,): the two map cells around each point and their weights, (n, size, 2 * points)."""
    cell = (extent / size).view(-1, 1, 1)
    number = torch.arange(size, dtype=low.dtype).view(-1, 1)
    at = low.view(-1, 1, 1) + number * cell + (torch.arange(points, dtype=low.dtype) + 0.5) * cell / points
    outside = (at < -1) | (at > length)
    at = at.clamp(0, length - 1)
    first = at.floor()
    share = at - first
    cells = torch.cat((first, (first + 1).clamp(max=length - 1)), -1).long()
    weights = torch.cat((1 - share, share), -1) / points
    return cells, weights.masked_fill(torch.cat((outside, outside), -1), 0)
