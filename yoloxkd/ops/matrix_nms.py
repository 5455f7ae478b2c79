"""Matrix NMS (SOLOv2, Wang et al. 2020, section 3.3): scores of overlapping masks decay, all at once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def decayed_scores(
    masks: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    kernel: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 2.0,
) -> Tensor:
    """Scores after decay by better masks of the same class.

    score_j is multiplied by the least, over better i of its class, of f(iou_ij) / f(m_i): m_i the largest overlap of i
    with a better one of its class, f(x) = exp(-sigma x²) or 1 - x.

    Args:
        masks: (n, H, W) bool or 0 and 1, best score first
        labels: (n,) int64
        scores: (n,)
        kernel: f
        sigma: of the Gaussian
    Returns:
        (n,) in the same order
    """
    flat = masks.flatten(1).to(scores.dtype)
    area = flat.sum(1)
    intersection = flat @ flat.T
    union = area[:, None] + area[None, :] - intersection
    better = torch.ones_like(intersection, dtype=torch.bool).triu(1) & (labels[:, None] == labels[None, :])
    overlap = (intersection / union.clamp(min=1)).masked_fill(~better, 0)
    best_overlap = overlap.amax(0) if len(scores) else scores
    if kernel == "gaussian":
        decay = (-sigma * (overlap.square() - best_overlap[:, None].square())).exp()
    else:
        decay = (1 - overlap) / (1 - best_overlap[:, None])
    return scores * decay.masked_fill(~better, 1).amin(0) if len(scores) else scores


def matrix_nms(
    masks: Tensor,
    labels: Tensor,
    scores: Tensor,
    *,
    candidates: int = 500,
    most: int = 100,
    threshold: float = 0.05,
    kernel: Literal["gaussian", "linear"] = "gaussian",
    sigma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Which masks stay.

    Args:
        masks: (n, H, W); labels: (n,) int64; scores: (n,)
        candidates: the best so many take part
        most: at most so many stay
        threshold: a decayed score must reach it
        kernel, sigma: see `decayed_scores`
    Returns:
        rows (m,) int64 and their decayed scores (m,), best first
    """
    order = scores.argsort(descending=True, stable=True)[:candidates]
    decayed = decayed_scores(masks[order], labels[order], scores[order], kernel=kernel, sigma=sigma)
    best = decayed.sort(descending=True, stable=True)
    stays = best.indices[best.values >= threshold][:most]
    return order[stays], decayed[stays]
