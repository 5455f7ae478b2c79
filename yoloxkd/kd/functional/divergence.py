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
LEAST_PROBABILITY = 1e-30
"""Of a class, and of its absence, where a logarithm is taken."""
EPSILON = 1e-7
"""The same of probabilities that are known as such, whose complement is rounded."""


class _ClassDivergence(Function):
    """The gradients by class logits and by objectness are written down in the forward pass."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, objectness: Tensor | None, teacher: Tensor, other: Tensor | None) -> Tensor:
        p_t, q_t = _probabilities(teacher, other)
        p_s, q_s = _probabilities(student, objectness)
        value = (p_t / p_s).log_().mul_(p_t).add_((q_t / q_s).log_().mul_(q_t))
        pull = p_s.sub_(p_t)
        of_object = None
        if objectness is not None:
            pull.div_(q_s)
            of_object = pull.sum(-1).mul_((-objectness).sigmoid_())
            pull.mul_((-student).sigmoid_())
        ctx.save_for_backward(pull, of_object)
        return value.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pull, of_object = ctx.saved_tensors
        return pull * grads[0][..., None], None if of_object is None else of_object * grads[0], None, None


def _probabilities(classes: Tensor, objectness: Tensor | None) -> tuple[Tensor, Tensor]:
    """p = sigmoid(classes) sigmoid(objectness) and 1 - p, neither by a difference, nor zero: (..., K) each."""
    p, q = classes.sigmoid(), (-classes).sigmoid_()
    if objectness is not None:
        q.addcmul_(p, (-objectness).sigmoid_()[..., None])
        p.mul_(objectness.sigmoid()[..., None])
    return p.clamp_min_(LEAST_PROBABILITY), q.clamp_min_(LEAST_PROBABILITY)


@without_autocast
def class_divergence(
    student: Tensor, teacher: Tensor, objectness: Tensor | None = None, teacher_objectness: Tensor | None = None
) -> Tensor:
    """Sum over classes of KL(teacher's || student's) between probabilities of each class: logits (..., K) -> (...).

    objectness  (...) logits whose probability the classes' are multiplied by, on either side
    It is the binary cross entropy with the teacher's probability as target, less the teacher's own entropy: the same
    gradient, and zero for a student that says what its teacher says.
    """
    logits = full_precision(student), full_precision(teacher).detach()
    quality, teacher_quality = (None if x is None else full_precision(x) for x in (objectness, teacher_objectness))
    if teacher_quality is not None:
        teacher_quality = teacher_quality.detach()
    result: Tensor = _ClassDivergence.apply(logits[0], quality, logits[1], teacher_quality)
    return result


@without_autocast
def bernoulli_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher's || student's) of each probability and its complement: (...) each -> (...)."""
    (p, q), (p_t, q_t) = ((x.clamp_min(EPSILON), (1 - x).clamp_min(EPSILON)) for x in (student, teacher.detach()))
    return p_t * (p_t / p).log() + q_t * (q_t / q).log()


@without_autocast
def softmax_divergence(student: Tensor, teacher: Tensor, tau: float = 1.0) -> Tensor:
    """tau² KL(teacher's || student's) of softmaxes over classes: logits (..., K) each -> (...). DeFeat's head term."""
    log_student = (full_precision(student) / tau).log_softmax(-1)
    log_teacher = (full_precision(teacher).detach() / tau).log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * (tau * tau)


@without_autocast
def squared_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over channels of (S - T)² at each cell, in float32 at least: (B, C, h, w) -> (B, h, w)."""
    return cell_error(full_precision(student), full_precision(teacher).detach())


def weighted_sums(error: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values of cells by their weights, and the weights, both summed over the cells of each image: (B, h, w) each -> (B,) each."""
    weight = weight.to(error.dtype)
    return (weight * error).sum((1, 2)), weight.sum((1, 2))


def image_means(sums: Tensor, weights: Tensor) -> Tensor:
    """Each image's sum over its weight, averaged over images; an image without weight counts as 0: (B,), (B,) -> scalar."""
    return (sums / weights.clamp_min(LEAST_WEIGHT)).mean()


def root(squares: Tensor) -> Tensor:
    """Square root of sums of squares (B,), whose gradient is zero where the sum is."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
