"""ATSS assigner: positives by the statistics of each box's candidates (Zhang et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match, image_parts, no_match
from yoloxkd.ops.boxes import from_distances, paired_diou, paired_iou, to_distances
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Grid, Targets

TOPK = 9
"""Candidates of a box on each level."""
SCALE = 8
"""Side of the one square anchor a location has, in strides."""
MARGIN = 0.01
"""px, how far inside the box the center of a positive anchor lies at least."""
MIN_UNION = 1e-6


def square_anchors(points: Tensor, strides: Tensor) -> Tensor:
    """The anchors of locations (..., 2) px with strides (...): (..., 4) xyxy px, of side 8 strides."""
    return from_distances(points, (strides * (SCALE / 2)).unsqueeze(-1).expand(*strides.shape, 4))


def within(points: Tensor, area: Tensor) -> Tensor:
    """Locations (A, 2) px inside the height and width (B, 2) px of each image: (B, A) bool."""
    return (points[:, 0] < area[:, 1:2]) & (points[:, 1] < area[:, 0:1])


@torch.no_grad()
def atss_match(
    grid: Grid,
    targets: Targets,
    *,
    topk: int = TOPK,
    area: Tensor | None = None,
    budget: int | None = None,
) -> Match:
    """Match anchors to boxes: reads boxes and mask of `targets`.

    The anchors are square, centered on the grid's points, whatever anchors the grid itself has.
    area  (B, 2) height and width px of each image inside the batch; anchors with their center beyond it take no part.
          None: `targets.content` says it, where it is given

    Candidates of a box are the `topk` anchors of each level with the nearest centers. Those with an IoU of at least
    the mean plus the standard deviation (n - 1) of all candidates' IoUs, and with their center inside the box, are
    positive. An anchor claimed by several boxes takes the one it overlaps most, the lower row among equals.
    """
    points, images, rows = grid.points, *targets.mask.shape
    if rows == 0:
        return no_match(images, points.shape[0], points.device)
    largest = max(part.stop - part.start for part in grid.slices())
    area = _image_sizes(targets) if area is None else area
    parts = []
    for part in image_parts(images, rows * largest, points.device, budget):
        usable = None if area is None else within(points, area[part])
        boxes = full_precision(targets.boxes[part])
        parts.append(_match(points.to(boxes.dtype), grid, boxes, targets.mask[part], topk, usable))
    return Match.joined(parts)


@torch.no_grad()
def near_misses(
    grid: Grid,
    targets: Targets,
    *,
    low: float,
    topk: int = TOPK,
    budget: int | None = None,
) -> Tensor:
    """Anchors that lie close to a box and would not be its positives: their IoU with it, 0 elsewhere, (B, A).

    An anchor is one when its distance IoU (DIoU) with a box is below that box's ATSS threshold, and at least `low`
    (0 to 1) times it; with several such boxes the largest IoU counts. Arguments otherwise as of `atss_match`.
    Source: the valuable localization region of LD (Zheng et al. 2022, algorithm 1).
    """
    points, images, rows = grid.points, *targets.mask.shape
    out = points.new_zeros(images, points.shape[0], dtype=full_precision(targets.boxes).dtype)
    if rows == 0:
        return out
    area = _image_sizes(targets)
    for part in image_parts(images, rows * points.shape[0], points.device, budget):
        boxes, mask = full_precision(targets.boxes[part]), targets.mask[part]
        at = points.to(boxes.dtype)
        usable = None if area is None else within(points, area[part])
        threshold = _statistics(at, grid, boxes, mask, topk, usable)[3]
        anchors, gt = square_anchors(at, grid.point_strides.to(boxes.dtype)), boxes.unsqueeze(2)
        distance = paired_diou(anchors, gt, MIN_UNION)
        near = (distance < threshold) & (distance >= low * threshold) & mask.unsqueeze(-1)
        out[part] = (paired_iou(anchors, gt, MIN_UNION) * near).amax(1)
    return out


def _image_sizes(targets: Targets) -> Tensor | None:
    """(B, 2) height and width px of the images inside the batch; None: padding is not told apart."""
    return None if targets.content is None else targets.content[:, 2:4].flip(1)


def _match(points: Tensor, grid: Grid, boxes: Tensor, mask: Tensor, topk: int, usable: Tensor | None) -> Match:
    candidate, real, iou, threshold = _statistics(points, grid, boxes, mask, topk, usable)
    gt = boxes.unsqueeze(2)
    inside = to_distances(points[candidate], gt).amin(-1) > MARGIN
    positive = (real & inside & (iou >= threshold)).flatten(1)
    # one anchor, several boxes: the largest IoU first, then the lowest row that has it
    images, rows, each = candidate.shape
    where, iou = candidate.flatten(1), iou.flatten(1)
    best = iou.new_full((images, points.shape[0]), -1.0)
    best = best.scatter_reduce(1, where, torch.where(positive, iou, -1.0), "amax")
    winner = positive & (iou == best.gather(1, where))
    row = torch.arange(rows, device=boxes.device).repeat_interleave(each).expand(images, -1)
    first = torch.full_like(best, rows, dtype=torch.int64)
    first = first.scatter_reduce(1, where, torch.where(winner, row, rows), "amin")
    fg = first < rows
    return Match.of(fg, torch.where(fg, first, -1))


def _statistics(
    points: Tensor, grid: Grid, boxes: Tensor, mask: Tensor, topk: int, usable: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The candidates of each box and what is expected of them.

    -> index (B, G, C) into A; whether that entry is one; its IoU with the box; the box's threshold (B, G, 1)
    """
    candidate, real = _candidates(points, grid, boxes, topk, usable)
    real &= mask.unsqueeze(-1)
    anchors = square_anchors(points[candidate], grid.point_strides[candidate].to(points.dtype))
    iou = paired_iou(anchors, boxes.unsqueeze(2), MIN_UNION)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    mean = (iou * real).sum(-1, keepdim=True) / count
    deviation = ((iou - mean).square() * real).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    return candidate, real, iou, mean + deviation.sqrt()


def _candidates(points: Tensor, grid: Grid, boxes: Tensor, topk: int, usable: Tensor | None) -> tuple[Tensor, Tensor]:
    """The nearest locations of each level: index (B, G, C) into A, and whether that entry is one."""
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    indices, real = [], []
    for here in grid.slices():
        x, y = points[here].unbind(-1)
        distance = ((x - center[..., 0:1]) ** 2 + (y - center[..., 1:2]) ** 2).sqrt()
        if usable is not None:
            distance = distance.masked_fill(~usable[:, None, here], torch.inf)
        near = distance.topk(min(topk, here.stop - here.start), dim=-1, largest=False)
        indices.append(near.indices + here.start)
        real.append(near.values < torch.inf)
    return torch.cat(indices, dim=-1), torch.cat(real, dim=-1)
