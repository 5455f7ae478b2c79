"""How far the student's probabilities and maps are from the teacher's: per location, per cell, per image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from yoloxkd.kd.functional.fused import cell_error
from yoloxkd.kd.functional.precision import full_precision, without_autocast

LEAST_WEIGHT = 1e-6
"""A sum of weights below it counts as no weight at all."""


class _BinaryDivergence(Function):
    """The gradient is the difference of the probabilities, which the forward pass writes down."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        p = teacher.sigmoid()
        value = F.logsigmoid(-teacher).sub_(F.logsigmoid(-student))
        value.sub_(p * (student - teacher)).clamp_min_(0.0)
        ctx.save_for_backward(student.sigmoid().sub_(p))
        return value.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * grads[0][..., None], None


@without_autocast
def binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over classes of KL(teacher's || student's) between the sigmoids of logits (..., K) -> (...).

    It is the binary cross entropy with the teacher's probability as target, less the teacher's own entropy: the same
    gradient, and zero for a student that says what its teacher says.
    """
    found: Tensor = _BinaryDivergence.apply(full_precision(student), full_precision(teacher).detach())
    return found


@without_autocast
def region_divergence(student: Tensor, teacher: Tensor, chosen: Tensor, tau: float = 1.0) -> Tensor:
    """tau² times the mean over chosen regions of KL(teacher's || student's) of softmaxes; 0 without any. DeFeat's head term.

    student, teacher  (..., R, K + 1) class logits of the same regions, background last; chosen (..., R) bool
    """
    ours = (full_precision(student) / tau).log_softmax(-1)
    theirs = (full_precision(teacher).detach() / tau).log_softmax(-1)
    rows = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return rows.masked_fill(~chosen, 0.0).sum() * (tau * tau) / chosen.sum().clamp_min(1)


@without_autocast
def weighted_error(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors by the weight of their cells, and the weights, both summed over the cells of each image: (B,) each.

    student, teacher (B, C, h, w); weight (B, h, w). The squared error of a cell is the sum over its channels.
    """
    error = cell_error(full_precision(student), full_precision(teacher).detach())
    weight = weight.to(error.dtype)
    return (weight * error).sum((1, 2)), weight.sum((1, 2))


def image_means(sums: Tensor, weights: Tensor) -> Tensor:
    """Each image's sum over its weight, averaged over images; an image without weight counts as 0: (B,), (B,) -> scalar."""
    return (sums / weights.clamp_min(LEAST_WEIGHT)).mean()


@without_autocast
def norms(difference: Tensor, weight: Tensor | None = None) -> Tensor:
    """Root of the sum of (weighted) squares of each image: (B, ...) -> (B,). The gradient at zero is zero.

    weight  of the squares, of a shape that broadcasts
    """
    squares = difference.square()
    if weight is not None:
        squares = squares * weight
    return squares.flatten(1).sum(1).clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
