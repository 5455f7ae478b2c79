"""Overlaps of boxes, one box at a time, for readings that the package's own arithmetic is held to."""

from __future__ import annotations

import torch
from torch import Tensor


def overlaps(boxes: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of boxes (A, 4) with one box (4,): (A,) each."""

    def area(x: Tensor) -> Tensor:
        return (x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1)

    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    common = (high - low).clamp(min=0).prod(1)
    union = (area(boxes) + area(box) - common).clamp(min=1e-6)
    hull = (torch.maximum(boxes[:, 2:], box[2:]) - torch.minimum(boxes[:, :2], box[:2])).prod(1).clamp(min=1e-6)
    return common / union, common / union - (hull - union) / hull
