"""Boxes in pixels as masks over the cells of a feature level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from yoloxkd.kd.functional.precision import full_precision
from yoloxkd.ops.boxes import pairwise_iou
from yoloxkd.ops.constants import constant
from yoloxkd.types import Batch

CELL_BUDGET = {"cpu": 4_000_000, "other": 2**26}
"""Elements of a (B, boxes, cells) intermediate by device: what fits a CPU's cache; elsewhere few launches count for more."""
MIN_UNION = 1e-6

CellSize = tuple[float, float]
"""Height and width of a cell, px of the network input."""


class BoxCells(NamedTuple):
    """The cells of a map that boxes touch; a cell belongs to a box when its row and its column do.

    Attributes:
        rectangle: (B, G, 4) x1, y1, x2, y2 in whole cells, both ends included, not clipped to the map.
        in_rows: (B, G, h) bool, of map rows.
        in_columns: (B, G, w) 0 or 1, of map columns.
    """

    rectangle: Tensor
    in_rows: Tensor
    in_columns: Tensor


def box_cells(boxes: Tensor, size: tuple[int, int], image_size: tuple[int, int] | Tensor) -> BoxCells:
    """The cells each box touches: from floor of its low to ceil of its high edge, both included.

    boxes (B, G, 4) px of an input of image_size (H, W), or (B, 2) of one each; size (h, w) of the map
    """
    h, w = size
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    if isinstance(image_size, tuple):
        sides = constant((image_size[1], image_size[0]) * 2, boxes.dtype, boxes.device)
    else:
        sides = image_size.flip(1).repeat(1, 2)[:, None]
    # multiplied before divided: exact for whole pixels, where a rounded ratio could push ceil one cell too far
    edges = boxes * constant((w, h, w, h), boxes.dtype, boxes.device) / sides
    rectangle = torch.cat([edges[..., :2].floor(), edges[..., 2:].ceil()], -1)
    x1, y1, x2, y2 = rectangle.split(1, -1)
    iy, ix = (constant(tuple(range(n)), boxes.dtype, boxes.device) for n in size)
    return BoxCells(rectangle, (iy >= y1) & (iy <= y2), ((ix >= x1) & (ix <= x2)).to(boxes.dtype))


def box_levels(boxes: Tensor, levels: int, base: float) -> Tensor:
    """The one level of each box by its size: boxes (..., 4) px -> (...) int64, 0 the finest of `levels`.

    floor(log2(sqrt((w + 1)(h + 1)) / base + 1e-6)), limited to the levels there are. DeFeat's release has base 56 px for a
    finest stride of 4.
    """
    side = (full_precision(boxes[..., 2:] - boxes[..., :2]) + 1).prod(-1).clamp_min(0).sqrt()
    return (side / base + 1e-6).log2().floor().clamp(0, levels - 1).long()


def whole_cells(boxes: Tensor, size: tuple[int, int], cell: CellSize) -> tuple[Tensor, Tensor]:
    """The cells each box (B, G, 4) px marks in DeFeat: its sides in cells, cut to whole numbers and to the map.

    -> cells (B, G, 4), x1, y1, x2, y2 of the cells x1 .. x2 - 1 and y1 .. y2 - 1;
       thin (B, G) bool, boxes within one column or one row of cells: each marks its first cell alone
    """
    h, w = size
    x1, y1, x2, y2 = full_precision(boxes).unbind(-1)
    low = torch.stack([x1 / cell[1], y1 / cell[0]], -1).trunc().clamp_min(0)
    high = torch.stack([(x2 / cell[1]).trunc().clamp_max(w), (y2 / cell[0]).trunc().clamp_max(h)], -1)
    thin = (low == high).any(-1)
    return torch.cat([low, torch.where(thin[..., None], low + 1, high)], -1), thin


def marked_cells(cells: Tensor, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells in at least one rectangle of `whole_cells` (B, G, 4): (B, h, w) bool; rows (B, G) bool, boxes that count."""
    iy, ix = (torch.arange(n, device=cells.device, dtype=cells.dtype) for n in size)
    x1, y1, x2, y2 = (c.unsqueeze(-1) for c in cells.unbind(-1))
    in_rows = (iy >= y1) & (iy < y2) & rows[..., None]
    in_columns = (ix >= x1) & (ix < x2)
    return torch.bmm(in_rows.to(cells.dtype).transpose(1, 2), in_columns.to(cells.dtype)) > 0


def gaussian_cells(cells: Tensor, thin: Tensor, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """A Gaussian in each rectangle of `whole_cells`, the largest over boxes: (B, h, w); rows (B, G) bool, boxes that count.

    exp(-((x - w/2) / (w/2))² / 2) for the columns x = 0 .. w - 1 of a rectangle of w columns, times the same over rows; the
    cell of a thin box has 1. This is the Gaussian mask in DeFeat's release, made there to compare with TADF.
    """
    x1, y1, x2, y2 = (c.unsqueeze(-1) for c in cells.unbind(-1))

    def along(n: int, low: Tensor, high: Tensor) -> Tensor:
        at = torch.arange(n, device=cells.device, dtype=cells.dtype)
        half = ((high - low) / 2).clamp_min(0.5)
        bell = (((at - low - half) / half).square() * -0.5).exp().masked_fill(thin[..., None], 1.0)
        return bell * ((at >= low) & (at < high))

    in_rows, in_columns = along(size[0], y1, y2) * rows[..., None], along(size[1], x1, x2)
    out = in_rows.new_zeros(len(cells), *size)
    for part in box_parts(cells.shape[1], out.numel(), out.device):
        out = torch.maximum(out, (in_rows[:, part, :, None] * in_columns[:, part, None, :]).amax(1))
    return out


@torch.no_grad()
def anchors_near_boxes(anchors: Tensor, boxes: Tensor, rows: Tensor, threshold: float) -> Tensor:
    """Anchors that overlap a box by more than `threshold` of the best overlap any anchor has with it. FGFI section 3.2.

    anchors (A, 4) px; boxes (B, G, 4) px, rows (B, G) bool, those that count -> (B, A) bool
    """
    boxes, anchors = full_precision(boxes), full_precision(anchors)
    out = torch.zeros(len(boxes), len(anchors), dtype=torch.bool, device=boxes.device)
    for part in box_parts(boxes.shape[1], out.numel(), out.device):
        overlap = pairwise_iou(boxes[:, part], anchors, MIN_UNION)
        least = overlap.amax(2, keepdim=True) * threshold
        out |= ((overlap > least) & rows[:, part, None]).any(1)
    return out


def box_parts(
    boxes: int, elements: int, device: torch.device, budget: Mapping[str, int] | None = None
) -> Iterator[slice]:
    """Slices of an axis of boxes, with `elements` values for each, that keep to a budget (default: `CELL_BUDGET`)."""
    limits = CELL_BUDGET if budget is None else budget
    step = max(1, limits.get(device.type, limits["other"]) // max(1, elements))
    for start in range(0, boxes, step):
        yield slice(start, start + step)


def cell_size(stride: int, finest: tuple[int, int], finest_stride: int, image_size: tuple[int, int]) -> CellSize:
    """Height and width px of a cell of a level of `stride`.

    finest  (h, w) of the detector's finest level, and its stride. They say at what size the detector saw the input
    (`teacher.scale`); at the input's own size a cell is as large as its stride.
    """
    return tuple(stride * side / (n * finest_stride) for side, n in zip(image_size, finest, strict=True))  # type: ignore[return-value]


def excluded_cells(
    batch: Batch, size: tuple[int, int], image_size: tuple[int, int], cells: BoxCells | None = None
) -> Tensor:
    """Cells in an ignore region, or whose center is outside the image: (B, h, w) bool; `cells` of the boxes, if at hand."""
    targets, content = batch.targets, batch.content
    rectangle, in_rows, in_columns = box_cells(targets.boxes, size, image_size) if cells is None else cells
    in_rows = (in_rows & targets.ignore[..., None]).to(rectangle.dtype)
    ignored = torch.bmm(in_rows.transpose(1, 2), in_columns) > 0
    y, x = (_centers(n, side / n, content) for n, side in zip(size, image_size, strict=True))
    rows = (y >= content[:, 1:2]) & (y < content[:, 3:4])
    columns = (x >= content[:, 0:1]) & (x < content[:, 2:3])
    return ignored | ~(rows[:, :, None] & columns[:, None, :])


def _centers(cells: int, side: float, like: Tensor) -> Tensor:
    """Of so many cells in a row, px."""
    return constant(tuple((i + 0.5) * side for i in range(cells)), like.dtype, like.device)
