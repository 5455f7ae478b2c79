"""AutoAssign (Zhu et al. 2020): every location inside a box has a share in it, by a learned prior and its own confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yoloxkd.nn.assigners.inside import InsidePairs, smallest_around
from yoloxkd.nn.assigners.match import Match, image_parts, row_parts
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fpn_detector import LEVELS, FPNConfig, FPNDetector, SharedHead
from yoloxkd.nn.detector import BoxCode
from yoloxkd.ops import devices
from yoloxkd.ops.boxes import from_distances, paired_giou, pairwise_iou
from yoloxkd.ops.losses import full_precision
from yoloxkd.ops.row_sums import confidence_negative, row_sums
from yoloxkd.types import DenseOutput, Draw, Grid, Loss, Losses, Targets, task_losses

PRIOR = 0.02
"""The probability an untrained head gives to every class."""
START = 4.0
"""Strides from a location to each side of its box, in an untrained head."""
POSITIVE_WEIGHT, NEGATIVE_WEIGHT, CENTER_WEIGHT = 0.25, 0.75, 0.75
BOX_WEIGHT = 5.0
"""Of the box loss in the confidence (paper eq. 4)."""
SHARPNESS = 3.0
"""How much more a location of high confidence weighs: e^(this times the confidence) (paper section 3.3)."""
EPS = 1e-12
LARGEST = 100.0
"""A box's positive loss is at most this."""
TENSORS = 4
"""Where all pairs are looked at, one part in so many of an assigner's budget of pairs is: intermediates are kept."""
LISTED = 2
"""Where pairs are listed, so many times the budget are looked at: few locations lie in a box."""


class CenterPrior(nn.Module):
    """A Gaussian a class over the distance from a box's center, in strides: its mean and its width (K, 2), x and y."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(classes, 2))
        self.sigma = nn.Parameter(torch.ones(classes, 2))

    def forward(self, offsets: Tensor, labels: Tensor) -> Tensor:
        """Offsets (..., 2) from the centers of boxes of classes (...): the prior (...), 1 at the mean. Paper eq. 3."""
        scaled = (offsets - full_precision(self.mean)[labels]) / full_precision(self.sigma)[labels]
        return (scaled.square().sum(-1) / -2).exp()


class AutoAssignHead(SharedHead):
    """The towers, their three 3x3 predictors, and the center prior."""

    def __init__(self, cfg: FPNConfig, classes: int, levels: int) -> None:
        super().__init__(cfg, levels, bias=True)
        self.conv_cls = nn.Conv2d(cfg.channels, classes, 3, padding=1)
        self.conv_reg = nn.Conv2d(cfg.channels, 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(cfg.channels, 1, 3, padding=1)
        self.center_prior = CenterPrior(classes)
        self.initialize(self.conv_cls, PRIOR)
        nn.init.constant_(self.conv_reg.get_parameter("bias"), START)


@dataclass(slots=True)
class BoxTerms:
    """What the losses read of each box (B, G).

    confidence  weighted mean confidence of the locations inside
    prior       sum of the center prior over them
    count       how many there are
    """

    confidence: Tensor
    prior: Tensor
    count: Tensor


class AutoAssign(FPNDetector):
    """AutoAssign on any timm backbone.

    Locations are the corners of the cells. `box_raw` of the output holds the distances to left, top, right and bottom in
    strides, not negative. `quality` is the logit of the implicit objectness.
    """

    Config = FPNConfig
    family = "autoassign"
    quality = "objectness"
    class_predictors = ("head.conv_cls.", "head.center_prior.")
    offset = 0.0
    relu_before_last = True
    extra_on_input = True

    head: AutoAssignHead

    def __init__(self, cfg: FPNConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.head = AutoAssignHead(cfg, len(names), len(LEVELS))

    @property
    def box_code(self) -> BoxCode:
        return BoxCode("distances")

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        head = self.head
        distances = [F.relu(full_precision(scale(head.conv_reg(x)))) for scale, x in zip(head.scales, reg, strict=True)]
        return Predictions([head.conv_cls(x) for x in cls], distances, [head.conv_centerness(x) for x in reg])

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        return from_distances(grid.points, full_precision(raw) * grid.point_strides.unsqueeze(-1))

    def class_probability(self, out: DenseOutput) -> Tensor:
        """(B, A, K): the class given an object, times the objectness; neither is trained alone."""
        return self.scores(out)

    def assign(self, out: DenseOutput, targets: Targets, draw: Draw = Draw()) -> Match:
        """Positive are the locations inside a box, for the smallest such box; the losses weigh them for every one."""
        return smallest_around(out.grid, targets).leaving_out(targets, out.grid)

    def losses(self, out: DenseOutput, targets: Targets, match: Match) -> Losses:
        """Training losses over the batch, of its boxes with a location inside.

        pos     0.25 (-log of the weighted mean confidence) of each box, divided by the number of boxes
        neg     0.75 x² (-log(1 - x)) of every location and class (paper eq. 7), x the confidence times the share that
                is negative (`lower_share`), divided by the sum of the center prior (at least 1). A location in an ignore region or in padding (`targets.ignore`, `targets.content`) that
                is in no box is left out
        center  0.75 (number of boxes / sum of the center prior), image by image, divided by the number of images
        """
        assert out.quality is not None
        with torch.autocast(out.quality.device.type, enabled=False):
            logits, quality = full_precision(out.cls_logits), full_precision(out.quality)
            boxes = self.decode(out.box_raw, out.grid)
            terms, share = box_terms(logits, quality, boxes, out.grid, targets, self.head.center_prior)
            has_locations = terms.count > 0
            positive_loss = -terms.confidence.clamp(min=torch.finfo(logits.dtype).tiny).log().clamp(min=-LARGEST)
            rows = row_sums(confidence_negative, logits, quality.unsqueeze(-1), share).masked_fill(match.ignored, 0)
            prior, number = terms.prior.sum(1), has_locations.sum(1)
            return task_losses(
                pos=Loss(POSITIVE_WEIGHT * positive_loss.masked_fill(~has_locations, 0).sum(), has_locations.sum()),
                neg=Loss(NEGATIVE_WEIGHT * rows.sum(), prior.detach().sum()),
                center=Loss(CENTER_WEIGHT * (number / prior.clamp(min=EPS)).sum(), torch.ones_like(number).sum()),
            )


def box_terms(
    logits: Tensor,
    quality: Tensor,
    predicted: Tensor,
    grid: Grid,
    targets: Targets,
    prior: CenterPrior,
    budget: int | None = None,
) -> tuple[BoxTerms, Tensor]:
    """What the losses read of each box, and the share of each location and class that is negative (B, A, K), 0 to 1.

    logits     (B, A, K) of the classes; quality (B, A) logits of the objectness
    predicted  (B, A, 4) px
    Some boxes are looked at in one go; what is kept for the gradient is computed anew where there are several goes.
    """
    boxes, labels, mask = full_precision(targets.boxes), targets.labels, targets.mask
    images, rows = mask.shape
    if rows == 0:  # one row that does not count
        boxes, labels, mask, rows = (
            boxes.new_zeros(images, 1, 4),
            labels.new_zeros(images, 1),
            mask.new_zeros(images, 1),
            1,
        )
    best = best_overlap(predicted.detach(), boxes, mask, budget)
    share = logits.new_ones(images, logits.shape[2], logits.shape[1])  # as the maps of logits lie in memory
    device = logits.device
    listed = device.type in devices.READ_DEVICES
    locations = len(grid.points) // LISTED if listed else len(grid.points) * TENSORS
    parts = list(image_parts(images, rows * locations, device, budget))
    sizes = [len(range(images)[part]) for part in parts]
    whole = logits.mT, quality, predicted
    divided = [(x,) if len(parts) == 1 else x.split(sizes) for x in whole]  # the gradient of a split is a copy
    of_parts = []
    for part, *predictions in zip(parts, *divided, strict=True):
        of_rows = []
        for some in row_parts(rows, len(range(images)[part]) * locations, device, budget):
            here, label = boxes[part, some], labels[part, some]
            pairs = InsidePairs.of(grid, here, mask[part, some])
            lower_share(share[part], best[part], label, pairs)
            arguments: tuple[Any, ...] = *predictions, grid, here, label, pairs, prior
            once = len(parts) == 1 and some == slice(0, rows)
            of_rows.append(
                _terms(*arguments)
                if once
                else checkpoint(_terms, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        of_parts.append([torch.cat(term, 1) for term in zip(*of_rows, strict=True)])
    confidence, sums, count = (torch.cat(term) for term in zip(*of_parts, strict=True))
    return BoxTerms(confidence, sums, count), share.mT


def _terms(
    logits: Tensor,
    quality: Tensor,
    predicted: Tensor,
    grid: Grid,
    boxes: Tensor,
    labels: Tensor,
    pairs: InsidePairs,
    prior: CenterPrior,
) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, sum of the prior, and number of locations of some boxes (b, r); logits (b, K, A). Paper eq. 3 to 5."""
    image, row, cell = pairs.image, pairs.row, pairs.cell
    label, box = labels[image, row], boxes[image, row]
    center = (box[..., :2] + box[..., 2:]) / 2
    offsets = (grid.points[cell] - center) / grid.point_strides[cell].unsqueeze(-1)
    near = prior(offsets, label)
    giou_loss = 1 - paired_giou(predicted[image, cell], box)
    joint = logits[image, label, cell].sigmoid() * quality[image, cell].sigmoid()
    confidence = joint * (-BOX_WEIGHT * giou_loss).exp()
    return weighted_mean(confidence, near, pairs), pairs.total(near), pairs.total(torch.ones_like(near))


def weighted_mean(confidence: Tensor, prior: Tensor, pairs: InsidePairs) -> Tensor:
    """The confidence of each box (b, r), from those of its locations and their prior (S). Paper eq. 5."""
    weight = (SHARPNESS * confidence).exp() * prior
    return pairs.total(weight * confidence) / pairs.total(weight).clamp(min=EPS)


@torch.no_grad()
def best_overlap(predicted: Tensor, boxes: Tensor, mask: Tensor, budget: int | None = None) -> Tensor:
    """The largest IoU of each predicted box (B, A, 4) with the boxes (B, G, 4) of its image that count: (B, A)."""
    images, count = predicted.shape[:2]
    best = predicted.new_zeros(images, count)
    by_columns = predicted.mT.contiguous().mT
    boxes = boxes.masked_fill(~mask.unsqueeze(-1), 0)  # which overlap nothing
    for part in image_parts(images, boxes.shape[1] * count, boxes.device, budget):
        for some in row_parts(boxes.shape[1], len(best[part]) * count, boxes.device, budget):
            overlap = pairwise_iou(boxes[part, some], by_columns[part])
            best[part] = torch.maximum(best[part], overlap.amax(1))
    return best


@torch.no_grad()
def lower_share(share: Tensor, best: Tensor, labels: Tensor, pairs: InsidePairs) -> None:
    """Lower the negative share (b, K, A) where a location inside a box predicts well, for the box's class (paper eq. 6).

    1 / (1 - IoU), rescaled over the locations of the box so that the best has a share of 0. Where boxes of one class
    overlap, the smallest share counts, so that the order of the boxes does not matter.
    """
    image, row, cell = pairs.image, pairs.row, pairs.cell
    certainty = 1 / (1 - best[image, cell]).clamp(min=EPS)
    low, high = pairs.spread(pairs.lowest(certainty)), pairs.spread(-pairs.lowest(-certainty))
    negative = pairs.where_inside(1 - (certainty - low + EPS) / (high - low + EPS), 1.0)
    index = (image * share.shape[1] + labels[image, row]) * share.shape[2] + cell
    share.view(-1).scatter_reduce_(0, index.flatten(), negative.flatten(), "amin")
