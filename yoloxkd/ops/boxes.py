"""Boxes as tensors: conversions and IoU. Boxes are (..., 4) x1, y1, x2, y2 in pixels; width is x2 - x1."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from yoloxkd.ops.constants import constant

LARGEST_LOG = abs(math.log(16 / 1000))
"""A side decoded from deltas is at most e^this times the anchor's, and at least the inverse (Fast R-CNN's code)."""


def to_center(boxes: Tensor) -> Tensor:
    """(..., 4) x1 y1 x2 y2 -> (..., 4) center x, center y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) center x, center y, width, height -> (..., 4) x1 y1 x2 y2."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((center - half, center + half), dim=-1)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...) px²; a box with x2 < x1 or y2 < y1 counts as empty."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def pairwise_iou(a: Tensor, b: Tensor, eps: float = 1e-16) -> Tensor:
    """Overlap of every box of `a` with every box of `b`.

    a (..., M, 4), b (..., N, 4) -> (..., M, N), intersection over union; the union is bounded below by `eps`, so two
    empty boxes overlap by 0. The coordinates are handled one by one and in place, which keeps the temporaries few and at (..., M, N).
    """
    ax1, ay1, ax2, ay2 = a.unsqueeze(-2).unbind(-1)  # (..., M, 1) each
    bx1, by1, bx2, by2 = b.unsqueeze(-3).unbind(-1)  # (..., 1, N) each
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (area(a).unsqueeze(-1) + area(b).unsqueeze(-2)).sub_(intersection).clamp_(min=eps)
    return intersection.div_(union)


def paired_iou(a: Tensor, b: Tensor, eps: float = 1e-16) -> Tensor:
    """Overlap of the boxes of `a` with the boxes of `b`, row by row.

    a, b (..., 4), shapes that broadcast -> (...), intersection over union; the union is bounded below by `eps`.
    """
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(dim=-1)
    union = area(a) + area(b) - intersection
    return intersection / union.clamp(min=eps)


def paired_giou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalized IoU (Rezatofighi et al. 2019) of the boxes of `a` with the boxes of `b`, row by row.

    a, b (..., 4), shapes that broadcast -> (...), -1 to 1: IoU - (hull - union) / hull; union and hull are at least `eps`.
    """
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    outer = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = inner.prod(dim=-1)
    union = (area(a) + area(b) - intersection).clamp(min=eps)
    hull = outer.prod(dim=-1).clamp(min=eps)
    return intersection / union - (hull - union) / hull


def paired_diou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Distance IoU (Zheng et al. 2020) of the boxes of `a` with the boxes of `b`, row by row.

    a, b (..., 4), shapes that broadcast -> (...), -1 to 1: IoU less the squared distance of the centers over the squared
    diagonal of the hull; union and squared diagonal are at least `eps`.
    """
    squared_distance = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).square().sum(-1) / 4
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    return paired_iou(a, b, eps) - squared_distance / hull.square().sum(-1).clamp(min=eps)


def from_distances(points: Tensor, distances: Tensor) -> Tensor:
    """Points (..., 2) and their distances left, top, right, bottom (..., 4) -> boxes (..., 4), in the unit of both."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)


def to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances left, top, right, bottom (..., 4) of points (..., 2) to the sides of boxes (..., 4); negative outside."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1)


def to_deltas(boxes: Tensor, anchors: Tensor, deviations: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The code of boxes at anchors, both (..., 4) px: shift of the center and logarithm of the size, in anchor sides.

    R-CNN (Girshick et al. 2014), appendix C; the four numbers are divided by `deviations`.
    """
    center, side = to_center(anchors).split(2, dim=-1)
    box_center, size = to_center(boxes).split(2, dim=-1)
    code = torch.cat(((box_center - center) / side, (size / side).log()), dim=-1)
    return code / constant(tuple(deviations), code.dtype, code.device)


def from_deltas(code: Tensor, anchors: Tensor, deviations: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The boxes (..., 4) px of which `code` (..., 4) is the code at anchors (..., 4) px; sides within `LARGEST_LOG`."""
    code = code * constant(tuple(deviations), code.dtype, code.device)
    center, side = to_center(anchors).split(2, dim=-1)
    size = code[..., 2:].clamp(-LARGEST_LOG, LARGEST_LOG).exp() * side
    return to_corners(torch.cat((center + code[..., :2] * side, size), dim=-1))
