"""Sums over classes of an elementwise function, as an autograd function with a written-out gradient.

Logits of a dense detector are many and their sums over classes few. Left to autograd, every intermediate of their size is
kept and passed through memory; here the forward pass works on what fits a cache and keeps the derivative alone, which
the backward pass turns into the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from yoloxkd.ops import devices

AT_ONCE = {"cpu": 2**19, "other": 2**28}
"""Elements worked on in one go."""

LARGEST = 0.9975
"""The p up to which log(1 - p) is taken from it in float32, of logits near 6: its relative error stays below 1e-5."""

Formula = Callable[..., tuple[Tensor, Tensor | None]]
"""Chunks of a tensor to write to, of x (..., K), and of further tensors -> sums (...) over K, and their derivative (...) in
the first further tensor, None where that carries no gradient; the derivative in x is written."""


class _RowSums(Function):
    @staticmethod
    def forward(ctx: Any, formula: Formula, x: Tensor, *others: Tensor) -> Tensor:
        if not any(ctx.needs_input_grad):
            return _sums(formula, None, x, others)[0]
        slope = torch.empty_like(x)
        rows, other_slope = _sums(formula, slope, x, others)
        ctx.formula, ctx.slopes = formula, (slope, other_slope)
        ctx.save_for_backward(x, *others)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        if ctx.slopes is None:  # of a graph that was kept
            slope = torch.empty_like(x)
            ctx.slopes = slope, _sums(ctx.formula, slope, x, others)[1]
        slope, other_slope = ctx.slopes
        ctx.slopes = None  # the first becomes the gradient, which saves a tensor of its size
        to_others: list[Tensor | None] = [None] * len(others)
        if other_slope is not None:
            to_others[0] = (other_slope * grads[0]).unsqueeze(-1)
        return None, slope.mul_(grads[0].unsqueeze(-1)), *to_others


def _sums(formula: Formula, slope: Tensor | None, x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The sums (..., n), and those of the second derivative of the formula; `slope`, if any, gets the derivative in x."""
    rows, other_rows = x.new_empty(x.shape[:-1]), x.new_empty(x.shape[:-1])
    other = None
    for here in _pieces(x):
        chunk = x[here]
        written = torch.empty_like(chunk) if slope is None else slope[here]
        rows[here[:-1]], other = formula(written, chunk, *(tensor[here] for tensor in others))
        if other is not None:
            other_rows[here[:-1]] = other
    return rows, None if other is None else other_rows


def _pieces(x: Tensor) -> Iterator[Any]:
    """Indices of parts of x (..., n, K) of about `AT_ONCE` elements: of several of the first axis, or some rows of one of them.

    An image's rows lie together, so that passes over its part run along memory.
    """
    limit = AT_ONCE.get(x.device.type, AT_ONCE["other"])
    length, width = x.shape[-2:]
    if x.ndim == 2:
        yield from ((rows, slice(None)) for rows in _even(length, limit // max(width, 1)))
        return
    first = x.shape[0]
    each = x.numel() // max(first, 1)
    for some in _even(first, limit // max(each, 1)):
        for rows in _even(length, limit * length // max(each, 1)):
            yield some, ..., rows, slice(None)


def _even(length: int, most: int) -> Iterator[slice]:
    """Slices of nearly one length, of at most `most` where that is 1 at least, that cover `length`."""
    count = -(-length // max(most, 1))
    step = -(-length // max(count, 1))
    for start in range(0, length, max(step, 1)):
        yield slice(start, start + step)


def row_sums(formula: Formula, x: Tensor, *others: Tensor) -> Tensor:
    """The sum over the last axis of what `formula` makes of x (..., n, K): (..., n).

    Gradients reach x, and the first of the others (..., n, 1) where the formula has a derivative for it.
    """
    sums: Tensor = _RowSums.apply(formula, x, *others)
    return sums


def focal(
    slope: Tensor, x: Tensor, label: Tensor, positive: Tensor, *, gamma: float, share: float
) -> tuple[Tensor, None]:
    """Focal loss of every class as a negative, and `share` times that of the label (..., 1) of positive rows as a positive.

    gamma: 1 at least
    """
    p = torch.sigmoid(x, out=slope)
    power = p * p if gamma == 2 else p**gamma
    gain = _log_miss(x, p).mul_(power)  # minus the loss
    # the derivative p^(gamma + 1) - gamma (1 - p) gain
    slope.mul_(power.add_(gain, alpha=gamma)).sub_(gain, alpha=gamma)
    loss, steep = _focal_positive(x.gather(-1, label), gamma, share)
    for table, at_label in ((gain, -loss), (slope, steep)):
        table.scatter_(-1, label, torch.where(positive, at_label, table.gather(-1, label)))
    return gain.sum(-1).neg_(), None


def _log_miss(x: Tensor, p: Tensor) -> Tensor:
    """log(1 - p) of logits x and their sigmoid p, as a new tensor.

    On a CPU softplus takes half as long again as the logarithm, which is as exact while p is not too near to 1.
    """
    if devices.may_read(x.device) and x.numel() and float(p.detach().amax()) <= LARGEST:
        return p.neg().log1p_()
    return F.softplus(x).neg_()


def _focal_positive(x: Tensor, gamma: float, share: float) -> tuple[Tensor, Tensor]:
    """Focal loss of logits that should be high, and its derivative."""
    miss, entropy = (-x).sigmoid(), F.softplus(-x)
    power = share * miss**gamma
    return power * entropy, -power * (gamma * (1 - miss) * entropy + miss)


def confidence_negative(slope: Tensor, x: Tensor, quality: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Y² (-log(1 - y)) of confidences y = share sigmoid(x) sigmoid(quality), of logits x and quality (..., 1)."""
    p, objectness = x.sigmoid(), quality.sigmoid()
    y = (p * share).mul_(objectness).clamp_(max=1 - torch.finfo(x.dtype).eps)
    minus = -y
    value = torch.log1p(minus).mul_(y).mul_(minus)
    # y times the derivative in y: 2 value + y³ / (1 - y)
    steep = (y * y).mul_(y).div_(minus.add_(1)).add_(value, alpha=2)
    torch.addcmul(steep, steep, p, value=-1, out=slope)
    return value.sum(-1), steep.sum(-1) * (1 - objectness).squeeze(-1)
