"""The losses of RetinaNet and AutoAssign as their papers read: one image and one box at a time, everything by autograd.

The batched versions of the package are held equal to these, and timed against them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.nn.dense.autoassign import AutoAssign
from yoloxkd.nn.dense.retinanet import RetinaNet
from yoloxkd.types import DenseOutput, Targets


def overlaps(boxes: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalized IoU of boxes (A, 4) with one box (4,): (A,) each."""

    def area(x: Tensor) -> Tensor:
        return (x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1])

    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    common = (high - low).clamp(min=0).prod(1)
    union = area(boxes) + area(box) - common
    far = torch.maximum(boxes[:, 2:], box[2:]) - torch.minimum(boxes[:, :2], box[:2])
    hull = far.prod(1)
    return common / union, common / union - (hull - union) / hull


def retinanet_assigned(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each anchor (A,), -1 background; and whether it is ignored."""
    best = torch.zeros(len(anchors))
    row = torch.full((len(anchors),), -1)
    for g in range(len(boxes)):
        iou, _ = overlaps(anchors, boxes[g])
        row[iou > best] = g
        best = torch.maximum(best, iou)
    positive, ignored = best >= 0.5, (best >= 0.4) & (best < 0.5)
    row[~positive] = -1
    for g in range(len(boxes)):
        iou, _ = overlaps(anchors, boxes[g])
        own = iou >= iou.max() * (1 - 1e-5)
        row[own], ignored[own] = g, False
    return row, ignored


def retinanet_by_box(model: RetinaNet, out: DenseOutput, targets: Targets) -> dict[str, Tensor]:
    anchors, count = out.grid.anchors, 0
    assert anchors is not None
    classes, codes = [], []
    for i in range(len(targets.boxes)):
        boxes, labels = targets.boxes[i][targets.mask[i]], targets.labels[i][targets.mask[i]]
        row, ignored = retinanet_assigned(anchors, boxes)
        wanted = torch.zeros_like(out.cls_logits[i])
        for g in range(len(boxes)):
            own = row == g
            wanted[own, labels[g]] = 1
            (x1, y1, x2, y2), (a1, b1, a2, b2) = boxes[g], anchors[own].unbind(1)
            w, h = a2 - a1, b2 - b1
            code = [
                (x1 + x2 - a1 - a2) / 2 / w,
                (y1 + y2 - b1 - b2) / 2 / h,
                ((x2 - x1) / w).log(),
                ((y2 - y1) / h).log(),
            ]
            codes.append((out.box_raw[i, own] - torch.stack(code, 1)).abs().sum())
        p = out.cls_logits[i].sigmoid()
        hit = wanted * p + (1 - wanted) * (1 - p)
        alpha = 0.25 * wanted + 0.75 * (1 - wanted)
        entropy = F.binary_cross_entropy_with_logits(out.cls_logits[i], wanted, reduction="none")
        classes.append((alpha * (1 - hit) ** 2 * entropy)[~ignored].sum())
        count += max(int((row >= 0).sum()), 1)
    return {"cls": torch.stack(classes).sum() / count, "box": torch.stack(codes).sum() / count}


def autoassign_by_box(model: AutoAssign, out: DenseOutput, targets: Targets) -> dict[str, Tensor]:
    points, strides, prior = out.grid.points, out.grid.point_strides, model.head.center_prior
    predicted = model.decode(out.box_raw, out.grid)
    assert out.quality is not None
    hits, misses, centers, total = [], [], [], torch.zeros(())
    for i in range(len(targets.boxes)):
        boxes, labels = targets.boxes[i][targets.mask[i]], targets.labels[i][targets.mask[i]]
        joint = out.cls_logits[i].sigmoid() * out.quality[i].sigmoid()[:, None]
        best = torch.zeros(len(points))
        for box in boxes:
            best = torch.maximum(best, overlaps(predicted[i].detach(), box)[0])
        share, sums = torch.ones_like(joint).detach(), []
        for g in range(len(boxes)):
            box, label = boxes[g], labels[g]
            inside = ((points > box[:2]) & (points < box[2:])).all(1)
            if not inside.any():
                continue
            offset = ((points - (box[:2] + box[2:]) / 2) / strides[:, None] - prior.mean[label]) / prior.sigma[label]
            near = (offset.square().sum(1) / -2).exp() * inside
            confidence = joint[:, label] * (-5 * (1 - overlaps(predicted[i], box)[1])).exp()
            weight = (3 * confidence).exp() * near
            hits.append(-((weight / weight.sum()) * confidence).sum().log())
            sums.append(near.sum())
            sure = 1 / (1 - best[inside])
            scaled = (sure - sure.min() + 1e-12) / (sure.max() - sure.min() + 1e-12)
            share[inside, label] = torch.minimum(share[inside, label], 1 - scaled)
        x = joint * share
        misses.append((-(x**2) * (1 - x).log()).sum())
        if sums:
            here = torch.stack(sums).sum()
            centers.append(len(sums) / here)
            total = total + here.detach()
    return {
        "pos": 0.25 * torch.stack(hits).mean(),
        "neg": 0.75 * torch.stack(misses).sum() / total.clamp(min=1),
        "center": 0.75 * torch.stack(centers).sum() / len(targets.boxes),
    }


PLAIN: dict[str, Callable[..., dict[str, Tensor]]] = {"retinanet": retinanet_by_box, "autoassign": autoassign_by_box}
