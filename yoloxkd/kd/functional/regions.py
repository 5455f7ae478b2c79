"""Regions of feature maps, as many for every image: which to take, and their features pooled to one size.

Legend: B images, N candidates, k regions of an image, C channels, s bins along a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.kd.functional.masks import CellSize
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.ops.boxes import paired_iou

LEVEL_SIDE, LEVEL_STRIDE = 224.0, 16.0
"""px: a region of this side is pooled from the level of this stride (Lin et al., FPN, 2017, eq. 1)."""


@torch.no_grad()
@without_autocast
def best_boxes(boxes: Tensor, scores: Tensor, k: int, iou: float, least_side: float) -> tuple[Tensor, Tensor]:
    """Greedy suppression in k slots: which of the candidates of each image stay, best first.

    boxes (B, N, 4) px, scores (B, N), -inf for those that do not count; a box falls when it overlaps a better one by more
    than `iou`, or when a side is not above `least_side` px
    -> index (B, k) into N, used (B, k) bool
    The k best of greedy suppression are found by k rounds over all images at once, each taking the best that is left: no
    list whose length the host would have to wait for.
    """
    boxes = full_precision(boxes)
    large = (boxes[..., 2:] - boxes[..., :2] > least_side).all(-1)
    remaining = full_precision(scores).masked_fill(~large, -torch.inf)
    indices, used = [], []
    for _ in range(k):
        best, index = remaining.max(1, keepdim=True)
        box = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        remaining = remaining.masked_fill(paired_iou(box, boxes) > iou, -torch.inf).scatter(1, index, -torch.inf)
        indices.append(index)
        used.append(best > -torch.inf)
    return torch.cat(indices, 1), torch.cat(used, 1)


def region_levels(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Index of the level that each region (..., 4) px is pooled from: one octave of size a level. (...) int64.

    strides  of the levels, finest first; where one is missing the next finer level answers for its sizes
    """
    side = full_precision(boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1).sqrt()
    octave = (side / LEVEL_SIDE + 1e-8).log2().floor()
    above = torch.stack([octave >= math.log2(stride / LEVEL_STRIDE) for stride in strides])
    return above.sum(0).sub(1).clamp_min(0)


@without_autocast
def pooled_regions(
    maps: Sequence[Tensor],
    cells: Sequence[CellSize],
    boxes: Tensor,
    level: Tensor,
    used: Tensor,
    *,
    bins: int = 10,
    samples: int = 2,
    excluded: Sequence[Tensor] | None = None,
) -> Tensor:
    """RoIAlign of every region from its own level, each level at once: (B, k, bins², C).

    maps      L x (B, C, h, w); cells L x (height, width) px of their cells
    boxes     (B, k, 4) px; level (B, k) index into the maps; used (B, k) bool, the features of others are zero
    bins      along each side of the result; samples along each side of a bin
    excluded  L x (B, h, w) bool, cells that are read as zero
    A bin is the mean of its samples, a sample the bilinear mean of four cells, whose centers lie half a cell from their
    corners (aligned RoIAlign, Mask R-CNN 2017). So a bin is a weighted sum of cells, which `embedding_bag` adds up without
    the samples being written down, and a region costs the same however many levels there are.
    """
    images, k = level.shape
    table = torch.cat([full_precision(m).flatten(2).transpose(1, 2) for m in maps], 1)
    sizes = [(m.shape[2], m.shape[3]) for m in maps]
    index, weight = _taps(boxes.to(table.dtype), level, sizes, cells, bins, samples)
    index = index + torch.arange(images, device=index.device).view(-1, 1, 1, 1) * table.shape[1]
    weight = weight * used.view(images, k, 1, 1)
    if excluded is not None:
        included = torch.cat([~x.flatten(1) for x in excluded], 1).flatten()
        weight = weight * included[index]
    # in one row a bin: (B k bins², taps)
    rows = F.embedding_bag(
        index.flatten(0, 2), table.flatten(0, 1), mode="sum", per_sample_weights=weight.flatten(0, 2)
    )
    return rows.view(images, k, bins * bins, -1)


@torch.no_grad()
def _taps(
    boxes: Tensor,
    level: Tensor,
    sizes: Sequence[tuple[int, int]],
    cells: Sequence[CellSize],
    bins: int,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """The cells of an image, level after level, that each bin reads, and their weights: (B, k, bins², (2 samples)²)."""
    h, w = (_of_level([size[i] for size in sizes], level) for i in (0, 1))
    starts = _of_level([0, *accumulate(a * b for a, b in sizes)], level)
    cell_y, cell_x = (_of_level([c[i] for c in cells], level.to(boxes.dtype)) for i in (0, 1))
    y, of_y = _along(boxes[..., 1] / cell_y, boxes[..., 3] / cell_y, h, bins, samples)
    x, of_x = _along(boxes[..., 0] / cell_x, boxes[..., 2] / cell_x, w, bins, samples)
    index = y[:, :, :, None, :, None] * w[:, :, None, None, None, None] + x[:, :, None, :, None, :]
    index = (index + starts[:, :, None, None, None, None]).flatten(4).flatten(2, 3)
    weight = (of_y[:, :, :, None, :, None] * of_x[:, :, None, :, None, :]).flatten(4).flatten(2, 3)
    return index, weight


def _of_level(values: Sequence[float], level: Tensor) -> Tensor:
    """The value of each region's level, in the dtype of `level`; from numbers of the host without waiting for the device."""
    out = torch.zeros_like(level)
    for i, value in enumerate(values):
        out = torch.where(level == i, value, out)
    return out


def _along(low: Tensor, high: Tensor, cells: Tensor, bins: int, samples: int) -> tuple[Tensor, Tensor]:
    """Along one axis, sides (B, k) in cells: the cells that each bin reads, and their weights, (B, k, bins, 2 samples)."""
    step = torch.arange(bins * samples, device=low.device, dtype=low.dtype)
    at = (low - 0.5)[..., None] + (high - low)[..., None] * ((step + 0.5) / (bins * samples))
    last = (cells - 1)[..., None]
    near = (at >= -1) & (at <= cells[..., None])
    at = torch.minimum(at.clamp_min(0), last.to(at.dtype))
    first = at.floor()
    share = at - first
    first = first.long()
    index = torch.stack([first, torch.minimum(first + 1, last)], -1)
    weight = torch.stack([1 - share, share], -1) * (near / samples)[..., None]
    return index.unflatten(2, (bins, samples)).flatten(3), weight.unflatten(2, (bins, samples)).flatten(3)
