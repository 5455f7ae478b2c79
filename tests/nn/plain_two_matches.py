"""The losses of DDOD and RepPoints as their papers read: one image and one box at a time.

The batched versions of the package are held equal to these, and timed against them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.nn.plain_boxes import overlaps
from yoloxkd.nn.dense.ddod import DDOD
from yoloxkd.nn.dense.reppoints import RepPoints
from yoloxkd.types import DenseOutput, Targets


def focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Focal loss of logits (n, K) against zeros and ones, summed."""
    p = logits.sigmoid()
    right = torch.where(wanted > 0, p, 1 - p)
    share = torch.where(wanted > 0, 0.25, 0.75)
    return -(share * (1 - right) ** 2 * right.clamp(min=1e-12).log()).sum()


def best_nine(points: Tensor, logits: Tensor, boxes: Tensor, gt: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """DDOD's assignment of one image: the row of each location (A,), -1 background."""
    row, value = torch.full((len(points),), -1), torch.zeros(len(points))
    for g in range(len(gt)):
        inside = torch.cat((points - gt[g, :2], gt[g, 2:] - points), 1).amin(1) > 0.01
        quality = logits[:, labels[g]].sigmoid() ** (1 - alpha) * overlaps(boxes, gt[g])[0] ** alpha * inside
        best = quality.topk(min(9, len(quality)))
        for cell, q in zip(best.indices.tolist(), best.values.tolist(), strict=True):
            if q > value[cell]:
                row[cell], value[cell] = g, q
    return row


def ddod_by_box(model: DDOD, out: DenseOutput, targets: Targets) -> dict[str, Tensor]:
    assert out.quality is not None
    rows: list[list[Tensor]] = [[], []]
    real = [(targets.boxes[i][targets.mask[i]], targets.labels[i][targets.mask[i]]) for i in range(len(targets.boxes))]
    for i, (gt, labels) in enumerate(real):
        for kind, alpha in zip(rows, (0.8, 0.6), strict=True):
            kind.append(
                best_nine(out.grid.points, out.cls_logits[i].detach(), out.boxes[i].detach(), gt, labels, alpha)
            )
    weights = []
    for kind in rows:
        number = torch.tensor([sum(int((r[s] >= 0).sum()) for r in kind) for s in out.grid.slices()])
        number = number.float()
        weights.append(2 - (number - number.min()) / (number.max() - number.min() + 1e-10))
    boxes_now = model.decode(out.box_raw, out.grid)
    sums = {name: torch.zeros(()) for name in ("cls", "box", "iou")}
    counts = [sum(max(int((r >= 0).sum()), 1) for r in kind) for kind in rows]
    for i, (gt, labels) in enumerate(real):
        for level, part in enumerate(out.grid.slices()):
            wanted = torch.zeros_like(out.cls_logits[i, part])
            for cell in (rows[0][i][part] >= 0).nonzero().flatten().tolist():
                wanted[cell, labels[rows[0][i][part][cell]]] = 1
            sums["cls"] = sums["cls"] + weights[0][level] * focal(out.cls_logits[i, part], wanted) / counts[0]
            for g in range(len(gt)):
                own = rows[1][i][part] == g
                if own.any():
                    iou, generalized = overlaps(boxes_now[i, part][own], gt[g])
                    factor = weights[1][level] / counts[1]
                    sums["box"] = sums["box"] + factor * 2 * (1 - generalized).sum()
                    entropy = F.binary_cross_entropy_with_logits(
                        out.quality[i, part][own], iou.detach(), reduction="sum"
                    )
                    sums["iou"] = sums["iou"] + factor * entropy
    return sums


def nearest_point(points: Tensor, strides: Tensor, gt: Tensor) -> Tensor:
    """RepPoints' first assignment of one image: the row of each location (A,), -1 background."""
    row, least = torch.full((len(points),), -1), torch.full((len(points),), torch.inf)
    levels = strides.unique()
    for g in range(len(gt)):
        side, center = gt[g, 2:] - gt[g, :2], (gt[g, 2:] + gt[g, :2]) / 2
        stride = (2 ** (side / 4).log2().mean().floor()).clamp(levels.min(), levels.max())
        apart = ((points - center) / side).square().sum(1).masked_fill(strides != stride, torch.inf)
        cell = apart.argmin()
        if apart[cell] < least[cell]:
            row[cell], least[cell] = g, apart[cell]
    return row


def by_overlap(boxes: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
    """RepPoints' second assignment of one image: the row of each location (A,), -1 background, and whether it is ignored."""
    best, row = torch.zeros(len(boxes)), torch.full((len(boxes),), -1)
    every = [overlaps(boxes, gt[g])[0] for g in range(len(gt))]
    for g, iou in enumerate(every):
        row[iou > best] = g
        best = torch.maximum(best, iou)
    ignored = (best >= 0.4) & (best < 0.5)
    row[best < 0.5] = -1
    for g, iou in enumerate(every):
        own = (iou >= iou.max() * (1 - 1e-5)) & (iou > 0)
        row[own], ignored[own] = g, False
    return row, ignored


def reppoints_by_box(model: RepPoints, out: DenseOutput, targets: Targets) -> dict[str, Tensor]:
    first, second = model.boxes_of(out.box_raw[..., :18], out.grid), model.boxes_of(out.box_raw[..., 18:], out.grid)
    unit = 4 * out.grid.point_strides.unsqueeze(1)
    sums, counts = {name: torch.zeros(()) for name in ("cls", "points", "box")}, [0, 0]
    for i in range(len(targets.boxes)):
        gt, labels = targets.boxes[i][targets.mask[i]], targets.labels[i][targets.mask[i]]
        near = nearest_point(out.grid.points, out.grid.point_strides, gt)
        row, ignored = by_overlap(first[i].detach(), gt)
        counts = [n + max(int((r >= 0).sum()), 1) for n, r in zip(counts, (near, row), strict=True)]
        wanted = torch.zeros_like(out.cls_logits[i])
        for g in range(len(gt)):
            wanted[row == g, labels[g]] = 1
            for name, boxes, own, weight in (("points", first, near == g, 0.5), ("box", second, row == g, 1.0)):
                loss = F.smooth_l1_loss(boxes[i][own] / unit[own], (gt[g] / unit)[own], beta=0.11, reduction="sum")
                sums[name] = sums[name] + weight * loss
        sums["cls"] = sums["cls"] + focal(out.cls_logits[i][~ignored], wanted[~ignored])
    return {"cls": sums["cls"] / counts[1], "points": sums["points"] / counts[0], "box": sums["box"] / counts[1]}


PLAIN: dict[str, Callable[[Any, DenseOutput, Targets], dict[str, Tensor]]] = {
    "ddod": ddod_by_box,
    "reppoints": reppoints_by_box,
}
