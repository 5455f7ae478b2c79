"""Per-cell sums that the losses are made of, with gradients written out.

A feature map is large and the sums over its channels are small. Left to autograd, every intermediate of the map's size
is kept for the backward pass; here the forward pass reuses one buffer and the backward pass rebuilds what it needs.

Legend: B images, C channels, N cells. The teacher's map carries no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Differences:
    """What FGD reads of two maps S and T: per cell (B, N), per channel (B, C).

    error     sum over channels of weight (S - T)²
    cells     mean over channels of |S|; channels: mean over cells of |S|
    total     sum over cells of S - T, per channel
    square    sum of (S - T)² of each image, (B,)
    """

    error: Tensor
    cells: Tensor
    channels: Tensor
    total: Tensor
    square: Tensor

    def shifted(self, shift: Tensor, cells: int) -> Tensor:
        """Sum of (S - T + shift)² over everything, with one shift a channel (B, C) and N cells."""
        return self.square.sum() + (shift * (2 * self.total + cells * shift)).sum()


class _Differences(Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, per_channel: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(student, teacher, per_channel)
        buffer = student.abs()
        cells, channels = buffer.mean(1), buffer.mean(2)
        torch.sub(student, teacher, out=buffer)
        total = buffer.sum(2)
        rows = torch.stack([per_channel, torch.ones_like(per_channel)], 1)
        error, plain = torch.bmm(rows, buffer.mul_(buffer)).unbind(1)
        return error, cells, channels, total, plain.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        error, cells, channels, total, square = grads
        student, teacher, per_channel = ctx.saved_tensors
        shape = student.shape[1:]
        grad = torch.sub(student, teacher)
        weighted = grad * error[:, None]
        grad.mul_(2 * square[:, None, None]).addcmul_(weighted, (2 * per_channel)[:, :, None])
        grad.add_(total[:, :, None])
        sign = torch.sign(student, out=weighted)
        grad.addcmul_(sign, (cells / shape[0])[:, None]).addcmul_(sign, (channels / shape[1])[:, :, None])
        return grad, None, None


def differences(student: Tensor, teacher: Tensor, per_channel: Tensor) -> Differences:
    """Student and teacher (B, C, N), per_channel (B, C) weights without gradient."""
    return Differences(*_Differences.apply(student, teacher, per_channel))


class _Pooled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        share = torch.bmm(weight.expand(x.shape[0], 1, -1), x).squeeze(1).softmax(1)
        ctx.save_for_backward(x, weight, share)
        return _over_cells(share, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight, share = ctx.saved_tensors
        (grad,) = grads
        inner = torch.bmm(grad[:, None], x).squeeze(1)
        logit = share * (inner - (share * inner).sum(1, keepdim=True))
        to_weight = _over_cells(logit, x).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, to_weight
        # cells first: channels lie side by side in the maps of the training loop, and so they do in the gradient
        by_cell = (share[:, :, None] * grad[:, None]).addcmul_(logit[:, :, None], weight)
        return by_cell.transpose(1, 2), to_weight


def _over_cells(row: Tensor, x: Tensor) -> Tensor:
    """(B, N) . (B, C, N) -> (B, C). With the row on the left: ten times faster where channels lie side by side."""
    return torch.bmm(row[:, None], x.transpose(1, 2)).squeeze(1)


def pooled(x: Tensor, weight: Tensor) -> Tensor:
    """Mean of the cells weighted by the softmax over cells of weight . x: x (B, C, N), weight (C,) -> (B, C).

    A bias beside `weight` would change nothing.
    """
    found: Tensor = _Pooled.apply(x, weight)
    return found


class _ShiftedError(Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher, shift)
        difference = torch.sub(student, teacher).add_(shift)
        return difference.mul_(difference).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        student, teacher, shift = ctx.saved_tensors
        grad = torch.sub(student, teacher).add_(shift).mul_(2 * grads[0])
        return grad, None, grad if shift.shape == grad.shape else grad.sum(2, keepdim=True)


def shifted_error(student: Tensor, teacher: Tensor, shift: Tensor) -> Tensor:
    """Sum of (S - T + shift)²: student, teacher (B, C, N), shift (B, C, 1) or (B, C, N) -> scalar."""
    found: Tensor = _ShiftedError.apply(student, teacher, shift)
    return found


class _LocalErrorAndAttention(Function):
    """The gradient is linear in what comes in for each cell, so that the forward pass writes down its two maps."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        channels = student.shape[2]
        buffer = student.abs()
        cells = buffer.mean(2)
        own = buffer.mul_(1 / tau).softmax(2)
        theirs = torch.abs(teacher, out=buffer).mul_(1 / tau).softmax(2)
        difference = torch.sub(student, teacher, out=buffer)
        apart = own - theirs
        weighted = theirs.mul_(difference)
        error = difference.mul_(weighted).sum(2).mul_(channels)
        distance = torch.linalg.vector_norm(apart, 1, dim=2).mul_(channels)
        # through the softmax: dz = A (dA - sum over channels of dA A)
        pull = apart.sign_()
        pull.sub_(torch.mul(pull, own, out=buffer).sum(2, keepdim=True)).mul_(own)
        sign = torch.sign(student, out=buffer)
        ctx.save_for_backward(weighted, pull.mul_(sign), sign.to(torch.int8))  # int8: a map less to keep
        ctx.tau = tau
        ctx.set_materialize_grads(False)
        return error, distance, cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        error, distance, cells = grads
        weighted, pull, sign = ctx.saved_tensors
        channels = sign.shape[2]
        parts = []
        if error is not None:
            parts.append((weighted, error * (2 * channels)))
        if distance is not None:
            parts.append((pull, distance * (channels / ctx.tau)))
        if cells is not None:
            parts.append((sign.to(cells.dtype), cells / channels))
        if not parts:
            return None, None, None
        grad = parts[0][0] * parts[0][1][:, :, None]
        for values, factor in parts[1:]:
            grad.addcmul_(values, factor[:, :, None])
        return grad, None, None


def local_error_and_attention(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of each cell under the teacher's local channel attention, and how far the two attentions are apart.

    With A(F) = C softmax over channels of |F| / tau; student, teacher (B, N, C), fastest with C contiguous
    -> over channels, (B, N) each: sum of A_T (S - T)², sum of |A_T - A_S|, mean of |S|
    """
    found: tuple[Tensor, Tensor, Tensor] = _LocalErrorAndAttention.apply(student, teacher, tau)
    return found
