"""Sums over classes of an elementwise function, as an autograd function with a written-out gradient.

Logits of a dense detector are many and their sums over classes few. Left to autograd, every intermediate of their size is
kept and passed through memory; here the forward pass works on what fits a cache and keeps the derivative alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

AT_ONCE = {"cpu": 2**18, "other": 2**28}
"""Elements worked on in one go."""

Formula = Callable[..., tuple[Tensor, Tensor]]
"""Chunks of x (..., K) and of further tensors -> values and their derivatives in x (..., K)."""


class _RowSums(Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, x: Tensor, *others: Tensor) -> Tensor:
        rows, keep = x.new_empty(x.shape[:-1]), ctx.needs_input_grad[1]
        slope = torch.empty_like(x) if keep else None
        length, width = x.shape[-2], max(x.numel() // max(x.shape[-2], 1), 1)
        step = max(1, AT_ONCE.get(x.device.type, AT_ONCE["other"]) // width)
        for start in range(0, length, step):
            here = (..., slice(start, start + step), slice(None))
            value, derivative = formula(x[here], *(other[here] for other in others))
            rows[here[:-1]] = value.sum(-1)
            if slope is not None:
                slope[here] = derivative
        if slope is not None:
            ctx.save_for_backward(slope)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return None, slope * grads[0].unsqueeze(-1), *(None for _ in ctx.needs_input_grad[2:])


def row_sums(formula: Formula, x: Tensor, *others: Tensor) -> Tensor:
    """The sum over the last axis of what `formula` makes of x (..., n, K): (..., n); the others carry no gradient."""
    sums: Tensor = _RowSums.apply(formula, x, *others)
    return sums


def focal(x: Tensor, label: Tensor, positive: Tensor, *, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Focal loss of every class as a negative, and at the label (..., 1) of positive rows as a positive."""
    p, entropy = x.sigmoid(), F.softplus(x)
    power = p.square() if gamma == 2 else p**gamma
    power.mul_(1 - alpha)
    derivative = (1 - p).mul_(entropy).mul_(gamma).add_(p).mul_(power)
    value = power.mul_(entropy)
    at_label = x.gather(-1, label)
    miss, entropy = (-at_label).sigmoid(), F.softplus(-at_label)
    power = alpha * miss**gamma
    value.scatter_(-1, label, torch.where(positive, power * entropy, value.gather(-1, label)))
    slope = -power * (gamma * (1 - miss) * entropy + miss)
    derivative.scatter_(-1, label, torch.where(positive, slope, derivative.gather(-1, label)))
    return value, derivative


def confidence_negative(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Y² (-log(1 - y)) of confidences y = share x, 0 to 1, and its derivative in x."""
    y = (x * share).clamp_(max=1 - torch.finfo(x.dtype).eps)
    entropy = torch.log1p(-y).neg_()
    square = y.square()
    derivative = (2 * y).mul_(entropy).add_(square / (1 - y)).mul_(share)
    return square.mul_(entropy), derivative
