"""Boxes as shifts and logarithms of sizes relative to another box (R-CNN, Girshick et al. 2014, appendix C)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from yoloxkd.ops.boxes import to_center, to_corners
from yoloxkd.ops.constants import constant

LIMIT = math.log(1000 / 16)
"""Bound of a decoded logarithm of a size, in both directions."""
ONES = (1.0, 1.0, 1.0, 1.0)


def encode(references: Tensor, boxes: Tensor, stds: Sequence[float] = ONES) -> Tensor:
    """dx, dy, dw, dh of boxes relative to references, divided by the standard deviations: (..., 4), (..., 4) px -> (..., 4)."""
    from_, to = to_center(references), to_center(boxes)
    shift = (to[..., :2] - from_[..., :2]) / from_[..., 2:]
    return torch.cat((shift, (to[..., 2:] / from_[..., 2:]).log()), dim=-1) / constant(
        tuple(stds), boxes.dtype, boxes.device
    )


def decode(references: Tensor, deltas: Tensor, stds: Sequence[float] = ONES) -> Tensor:
    """The boxes that `encode` would give these deltas for: (..., 4) px, (..., 4) -> (..., 4) px."""
    deltas, from_ = deltas * constant(tuple(stds), deltas.dtype, deltas.device), to_center(references)
    center = from_[..., :2] + deltas[..., :2] * from_[..., 2:]
    size = from_[..., 2:] * deltas[..., 2:].clamp(-LIMIT, LIMIT).exp()
    return to_corners(torch.cat((center, size), dim=-1))


def clip(boxes: Tensor, areas: Tensor) -> Tensor:
    """Boxes (B, ..., 4) px cut at the right and lower edges (B, 2) x, y px of their images, and at 0."""
    limit = areas.to(boxes.dtype).repeat(1, 2).view(len(areas), *[1] * (boxes.ndim - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limit)
