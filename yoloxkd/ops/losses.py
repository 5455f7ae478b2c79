"""Loss terms as pure functions: unreduced, so that the caller masks, weighs and sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.ops.boxes import paired_iou


def full_precision(x: Tensor) -> Tensor:
    """The tensor in float32, whatever autocast made of it; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def squared_iou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - IoU² of boxes paired row by row: (..., 4), (..., 4) xyxy px -> (...)."""
    return 1 - paired_iou(predicted, target) ** 2


def soft_class_loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Binary cross entropy against `quality` at the label's class and 0 at every other, summed over classes.

    logits (..., K), labels (...) int64, quality (...) in 0..1 -> (...).
    Since -t log p - (1 - t) log(1 - p) = -log(1 - p) - t x for the logit x of p, no one-hot target is built.
    """
    everywhere = -F.logsigmoid(-logits).sum(dim=-1)
    at_label = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return everywhere - at_label * quality
