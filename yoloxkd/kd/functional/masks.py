"""Boxes in pixels as masks over the cells of a feature level."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.types import Batch


def box_cells(
    boxes: Tensor, rows: Tensor, size: tuple[int, int], image_size: tuple[int, int] | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The cells each box touches: from floor of its low to ceil of its high edge, both included.

    boxes (B, G, 4) px of an input of image_size (H, W), or (B, 2) of one each; rows (B, G) bool, boxes that count
    -> rectangle (B, G, 4) x1, y1, x2, y2 in whole cells, not clipped to the map;
       membership of map rows (B, G, h) and of map columns (B, G, w), 0 or 1, all 0 for a box that does not count.
    A cell belongs to a box when its row and its column do.
    """
    h, w = size
    height, width = image_size if isinstance(image_size, tuple) else (image_size[:, 0:1], image_size[:, 1:2])
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    # multiplied before divided: exact for whole pixels, where a rounded ratio could push ceil one cell too far
    x1, x2 = (boxes[..., 0] * w / width).floor(), (boxes[..., 2] * w / width).ceil()
    y1, y2 = (boxes[..., 1] * h / height).floor(), (boxes[..., 3] * h / height).ceil()
    rectangle = torch.stack([x1, y1, x2, y2], -1)
    iy = torch.arange(h, device=boxes.device, dtype=boxes.dtype)
    ix = torch.arange(w, device=boxes.device, dtype=boxes.dtype)
    in_rows = (iy >= y1[..., None]) & (iy <= y2[..., None]) & rows[..., None]
    in_columns = (ix >= x1[..., None]) & (ix <= x2[..., None])
    return rectangle, in_rows.to(boxes.dtype), in_columns.to(boxes.dtype)


def excluded_cells(batch: Batch, size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """Cells in an ignore region, or whose center is outside the image: (B, h, w) bool."""
    targets, content = batch.targets, batch.content
    _, in_rows, in_columns = box_cells(targets.boxes, targets.ignore, size, image_size)
    ignored = torch.bmm(in_rows.transpose(1, 2), in_columns) > 0
    h, w = size
    y = (torch.arange(h, device=content.device) + 0.5) * (image_size[0] / h)
    x = (torch.arange(w, device=content.device) + 0.5) * (image_size[1] / w)
    rows = (y >= content[:, 1:2]) & (y < content[:, 3:4])
    columns = (x >= content[:, 0:1]) & (x < content[:, 2:3])
    return ignored | ~(rows[:, :, None] & columns[:, None, :])
