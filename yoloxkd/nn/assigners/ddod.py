"""DDOD: positives by the quality of what is predicted, once for the classes and once for the boxes (Chen et al. 2021)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.nn.assigners.atss import MARGIN, MIN_UNION
from yoloxkd.nn.assigners.inside import inside
from yoloxkd.nn.assigners.match import Match, eligible, image_parts, match_claims, no_match
from yoloxkd.ops.boxes import pairwise_iou, to_distances
from yoloxkd.ops.losses import full_precision
from yoloxkd.types import Grid, Targets

Order = Literal["paper", "release"]

TOPK = 9
"""Predictions of a box, over all levels together."""
ALPHAS = (0.8, 0.6)
"""The overlap's part in the quality, of the assignment for the classes and of that for the boxes."""


@torch.no_grad()
def ddod_matches(
    grid: Grid,
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    *,
    order: Order = "paper",
    area: Tensor | None = None,
    budget: int | None = None,
) -> tuple[Match, Match]:
    """Match predictions to boxes, for the classes and for the boxes; reads boxes, labels, mask and ignore of `targets`.

    logits  (B, A, K) of the classes; boxes (B, A, 4) px, as predicted
    order   "paper": the best `TOPK` of those whose location is inside the box; "release": the best `TOPK` anywhere, of which
            those inside remain
    area    (B, 2) height and width px of each image inside the batch; locations beyond it take no part. None:
            `targets.content` says it, where it is given

    The quality of a prediction for a box is p^(1 - alpha) IoU^alpha, p its probability of the box's class (DDOD eq. 4). A
    prediction claimed by several boxes takes the one that it has the largest quality for, the lower row among equals.
    """
    (images, rows), locations = targets.mask.shape, grid.points.shape[0]
    if rows == 0:
        none = no_match(images, locations, grid.points.device)
        return none, none
    usable = eligible(grid, targets, area)
    parts: list[list[Match]] = [[], []]
    for part in image_parts(images, rows * locations, grid.points.device, budget):
        gt = full_precision(targets.boxes[part])
        candidate = targets.mask[part].unsqueeze(-1) & usable[part].unsqueeze(1)
        if order == "paper":
            candidate = candidate & inside(grid, gt, MARGIN)
        overlap = pairwise_iou(gt, full_precision(boxes[part]), MIN_UNION).masked_fill_(~candidate, 0)
        for matches, alpha in zip(parts, ALPHAS, strict=True):
            factor = class_factor(full_precision(logits[part]), targets.labels[part], alpha)
            matches.append(_match(grid.points, factor.mul_(overlap), gt))
    return Match.joined(parts[0]), Match.joined(parts[1])


def class_factor(logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """What the overlap is multiplied by: p^((1 - alpha) / alpha), (B, G, A) from logits (B, A, K) and labels (B, G).

    The product is the quality to the power 1 / alpha, which has the same order and is less often rounded to zero.
    """
    (images, _, classes), rows = logits.shape, labels.shape[1]
    by_class = logits.transpose(1, 2)
    index = (labels + torch.arange(images, device=labels.device).unsqueeze(1) * classes).flatten()

    def factor(x: Tensor) -> Tensor:
        return F.logsigmoid(x).mul_((1 - alpha) / alpha).exp_()

    def at_labels(x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, index).view(images, rows, -1)

    return at_labels(factor(by_class)) if classes < rows else factor(at_labels(by_class))


def _match(points: Tensor, quality: Tensor, boxes: Tensor) -> Match:
    """The best of every box: quality (B, G, A), zero where a prediction is none of a box's -> their match."""
    best = quality.topk(min(TOPK, quality.shape[2]), dim=-1)
    within = to_distances(points[best.indices].to(boxes.dtype), boxes.unsqueeze(2)).amin(-1) > MARGIN
    return match_claims(best.indices, best.values, within & (best.values > 0), quality.shape[2])
