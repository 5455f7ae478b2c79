"""Loss terms as pure functions: unreduced, so that the caller masks, weighs and sums; in float32 at least."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.ops.boxes import paired_giou, paired_iou
from yoloxkd.ops.row_sums import focal, row_sums


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, whatever autocast made of it; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A block without autocast on the device of `x`. A tensor of shapes alone, by which operations are counted, has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def squared_iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU² of boxes paired row by row: (..., 4), (..., 4) xyxy px -> (...)."""
    predicted, target = full_precision(predicted), full_precision(target)
    return 1 - paired_iou(predicted, target) ** 2


def soft_class_loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Binary cross entropy against `quality` at the label's class and 0 at every other, summed over classes.

    logits (..., K), labels (...) int64, quality (...) in 0..1 -> (...).
    Since -t log p - (1 - t) log(1 - p) = -log(1 - p) - t x for the logit x of p, no one-hot target is built.
    """
    logits, quality = full_precision(logits), full_precision(quality)
    everywhere = -F.logsigmoid(-logits).sum(dim=-1)
    at_label = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return everywhere - at_label * quality


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - generalized IoU of boxes paired row by row: (..., 4), (..., 4) xyxy -> (...)."""
    predicted, target = full_precision(predicted), full_precision(target)
    return 1 - paired_giou(predicted, target)


def log_iou_loss(predicted: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """-log of the IoU, which is at least `eps`, of boxes paired row by row: (..., 4), (..., 4) xyxy -> (...)."""
    predicted, target = full_precision(predicted), full_precision(target)
    return -paired_iou(predicted, target, eps).clamp(min=eps).log()


def focal_loss(logits: Tensor, labels: Tensor, positive: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss (Lin et al. 2017), summed over classes.

    logits (..., K), labels (...) int64 class of the positive rows (any valid index elsewhere), positive (...) bool -> (...).
    Every class of every row counts as negative first; at the label of positive rows that is replaced. gamma is 1 at least,
    alpha below 1.
    """
    formula = partial(focal, gamma=gamma, share=alpha / (1 - alpha))
    return (1 - alpha) * row_sums(formula, full_precision(logits), labels.unsqueeze(-1), positive.unsqueeze(-1))


def quality_focal_loss(logits: Tensor, labels: Tensor, positive: Tensor, score: Tensor) -> Tensor:
    """Quality focal loss (GFL, Li et al. 2020, eq. 3 with beta 2), summed over classes.

    logits (..., K), labels (...) int64, positive (...) bool, score (...) the target at the label of positive rows -> (...):
    cross entropy against the target times the square of the distance to it; the target is 0 everywhere else.
    """
    logits, score = full_precision(logits), full_precision(score)

    def as_negative(x: Tensor) -> Tensor:
        return F.softplus(x) * x.sigmoid() ** 2

    at_label = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = F.softplus(at_label) - at_label * score
    as_positive = entropy * (score - at_label.sigmoid()) ** 2
    return as_negative(logits).sum(dim=-1) + torch.where(positive, as_positive - as_negative(at_label), 0.0)


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Distribution focal loss (GFL eq. 6): cross entropy of the two bins around a real-valued target.

    logits (..., n) of the bins 0 .. n - 1, target (...) in [0, n - 1) -> (...).
    """
    logits, target = full_precision(logits), full_precision(target)
    log_p = logits.log_softmax(dim=-1)
    low = target.detach().floor().long()
    high_share = target - low

    def at(bin_: Tensor) -> Tensor:
        return log_p.gather(-1, bin_.unsqueeze(-1)).squeeze(-1)

    return -(at(low) * (1 - high_share) + at(low + 1) * high_share)
