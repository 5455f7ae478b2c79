"""Fused distillation losses: per-cell sums as autograd functions with written-out gradients.

A feature map is large and the sums over its channels are small. Left to autograd, every intermediate of the map's size
is kept for the backward pass; here the forward pass reuses one buffer and the backward pass rebuilds what it needs.

Legend: B images, C channels, N cells. The teacher's map carries no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

IN_CACHE = 2**19
"""Elements of a map that are worked on at once on a CPU, where every pass over more goes to memory."""


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
        error, square = torch.bmm(rows, buffer.mul_(buffer)).unbind(1)
        return error, cells, channels, total, square.sum(1)

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
    result: Tensor = _Pooled.apply(x, weight)
    return result


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
    result: Tensor = _ShiftedError.apply(student, teacher, shift)
    return result


class _CellError(Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ctx.save_for_backward(student, teacher)
        difference = torch.sub(student, teacher)
        return difference.mul_(difference).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, teacher = ctx.saved_tensors
        return torch.sub(student, teacher).mul_(2 * grads[0][:, None]), None


def cell_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over channels of (S - T)² at each cell: student, teacher (B, C, ...) -> (B, ...)."""
    result: Tensor = _CellError.apply(student, teacher)
    return result


class _LocalErrorAndAttention(Function):
    """The gradient is linear in what comes in for each cell, so that the forward pass writes down its two maps."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, tau: float, strength: bool) -> tuple[Tensor | None, ...]:
        weighted, pull = torch.empty_like(student), torch.empty_like(student)
        error, distance, cells = (student.new_empty(student.shape[:2]) for _ in range(3))
        sign = torch.empty_like(student, dtype=torch.int8) if strength else None  # int8: a map less to keep
        for i in _in_cache(student):
            _local_terms(student[i], teacher[i], tau, weighted[i], pull[i], error[i], distance[i])
            if sign is not None:
                torch.mean(student[i].abs(), 2, out=cells[i])
                sign[i] = student[i].sign()
        ctx.save_for_backward(weighted, pull, sign)
        ctx.tau = tau
        ctx.set_materialize_grads(False)
        return error, distance, cells if strength else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        error, distance, cells = grads
        weighted, pull, sign = ctx.saved_tensors
        channels = weighted.shape[2]
        parts = []
        if error is not None:
            parts.append((weighted, error * (2 * channels)))
        if distance is not None:
            parts.append((pull, distance * (channels / ctx.tau)))
        if cells is not None:
            parts.append((sign.to(cells.dtype), cells / channels))
        if not parts:
            return None, None, None, None
        grad = parts[0][0] * parts[0][1][:, :, None]
        for values, factor in parts[1:]:
            grad.addcmul_(values, factor[:, :, None])
        return grad, None, None, None


def _local_terms(
    student: Tensor, teacher: Tensor, tau: float, weighted: Tensor, pull: Tensor, error: Tensor, distance: Tensor
) -> None:
    """Write the results of some images (b, N, C) to where they belong, and the two maps of the gradient.

    weighted  A_T (S - T) / C; pull: of the distance through |S| / tau, over C. (b, N, C)
    """
    channels = student.shape[2]
    buffer = student.abs()
    student_attention = buffer.mul_(1 / tau).softmax(2)
    torch.softmax(torch.abs(teacher, out=buffer).mul_(1 / tau), 2, out=weighted)
    torch.sub(student_attention, weighted, out=pull)
    difference = torch.sub(student, teacher, out=buffer)
    torch.sum(difference.mul_(weighted.mul_(difference)), 2, out=error).mul_(channels)
    torch.sum(torch.abs(pull, out=buffer), 2, out=distance).mul_(channels)
    # through the softmax: dz = A (dA - sum over channels of dA A)
    pull.sign_()
    pull.sub_(torch.mul(pull, student_attention, out=buffer).sum(2, keepdim=True)).mul_(student_attention)
    pull.mul_(torch.sign(student, out=buffer))


def _in_cache(x: Tensor) -> Iterator[slice]:
    """Slices of the images of (B, N, C): on a CPU so few that the passes over them find them in its cache."""
    images = len(x)
    step = max(1, IN_CACHE * images // max(1, x.numel())) if x.device.type == "cpu" else max(1, images)
    for start in range(0, images, step):
        yield slice(start, start + step)


def local_error_and_attention(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Squared error of each cell under the teacher's local channel attention, and how far the two attentions are apart.

    With A(F) = C softmax over channels of |F| / tau; student, teacher (B, N, C), fastest with C contiguous
    -> over channels, (B, N) each: sum of A_T (S - T)², sum of |A_T - A_S|
    """
    error, distance, _ = _LocalErrorAndAttention.apply(student, teacher, tau, False)
    return error, distance


def local_error_attention_and_strength(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the mean of |S| over channels, (B, N)."""
    result: tuple[Tensor, Tensor, Tensor] = _LocalErrorAndAttention.apply(student, teacher, tau, True)
    return result


class _WeightedSquares(Function):
    """The gradient is linear in what comes in for each image, so that the forward pass writes down its map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cells: Tensor, channels: Tensor | None) -> Tensor:
        pull = x * cells[:, :, None]
        if channels is not None:
            pull.mul_(channels[:, None])
        ctx.save_for_backward(pull)
        return torch.bmm(pull.flatten(1)[:, None], x.flatten(1)[:, :, None]).flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (pull,) = ctx.saved_tensors
        return pull * (2 * grads[0])[:, None, None], None, None


def weighted_squares(x: Tensor, cells: Tensor, channels: Tensor | None = None) -> Tensor:
    """Sum of weighted squares of each image: x (B, N, C), weights (B, N) and (B, C) without gradient -> (B,)."""
    total: Tensor = _WeightedSquares.apply(x, cells, channels)
    return total


class _Means(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.size = x.shape[1:]
        return x.mean(2), x.mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        cells, channels = ctx.size
        grad: Tensor = (grads[0] / channels)[:, :, None] + (grads[1] / cells)[:, None]
        return grad


def cell_and_channel_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the channels of each cell, and over the cells of each channel: (B, N, C) -> (B, N), (B, C)."""
    means: tuple[Tensor, Tensor] = _Means.apply(x)
    return means
