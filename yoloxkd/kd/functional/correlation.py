"""Sums over a batch from which the correlation of two maps' channels follows, and that correlation as a loss.

What belongs to a whole batch is a sum over images, so that the images may come in parts and on several processes.
Legend: B images, C channels, N cells.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from yoloxkd.kd.functional.precision import full_precision, without_autocast

EPS = 1e-6
"""Added to a channel's deviation, as in the released code of PKD."""
FLAT = 1e-12
"""A channel whose sum of squares about its mean is a smaller part of its sum of squares than this is constant."""


class _Moments(Function):
    """Sums are taken about the mean of these images, in the maps' own precision, and moved to zero in float64."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
        n = counted.sum()
        means = [torch.einsum("bcn,bn->c", x, counted) / n.clamp(min=1) for x in (student, teacher)]
        s, t = ((x - mean[:, None]).mul_(counted[:, None]) for x, mean in zip((student, teacher), means, strict=True))
        around = [s.sum((0, 2)), t.sum((0, 2)), *((a * b).sum((0, 2)) for a, b in ((s, s), (t, t), (s, t)))]
        ctx.save_for_backward(student, teacher, counted, *means)
        (ms, mt), n = (mean.double() for mean in means), n.double()
        ds, dt, ss, tt, st = (x.double() for x in around)
        moved = [
            ds + n * ms,
            dt + n * mt,
            ss + ms * (2 * ds + n * ms),
            tt + mt * (2 * dt + n * mt),
            st + ms * dt + mt * ds + n * ms * mt,
        ]
        return torch.cat([n[None], *moved])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, counted, ms, mt = ctx.saved_tensors
        first, _, square, _, product = grads[0][1:].view(5, -1)
        constant = (first + 2 * square * ms + product * mt).to(student.dtype)[:, None]
        grad = (student - ms[:, None]).mul_((2 * square).to(student.dtype)[:, None])
        grad.addcmul_(teacher - mt[:, None], product.to(student.dtype)[:, None]).add_(constant)
        return grad.mul_(counted[:, None]), None, None


@without_autocast
def channel_moments(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """The number of counted cells, and for each channel the sums over them of S, T, S², T² and S T: (1 + 5 C,) float64.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w), without gradient.
        counted: (B, h, w) bool, cells that count.
    """
    student_map, teacher_map = full_precision(student).flatten(2), full_precision(teacher).detach().flatten(2)
    moments: Tensor = _Moments.apply(student_map, teacher_map, counted.flatten(1).to(student_map.dtype))
    return moments


def correlation_loss(moments: Tensor) -> Tensor:
    """Half the mean of (S' - T')², each channel brought to mean 0 and deviation 1 over the whole batch.

    That is 1 - r in the mean over channels, r the Pearson correlation of a channel of the two maps (PKD, Cao et al., NeurIPS
    2022), up to what `EPS` in the denominators changes. A constant channel counts as 0 everywhere.

    Args:
        moments: the sum over the batch of `channel_moments`.
    """
    n = moments[0].detach().clamp(min=1)
    s, t, ss, tt, st = moments[1:].view(5, -1)
    ss, tt, st, raw_ss, raw_tt = ss - s * s / n, tt - t * t / n, st - s * t / n, ss, tt
    varies = [x > FLAT * raw for x, raw in ((ss, raw_ss), (tt, raw_tt))]
    # 1 where a channel is constant: a root has no gradient at 0
    deviations = [(x.where(v, 1.0) / (n - 1).clamp(min=1)).sqrt() + EPS for x, v in zip((ss, tt), varies, strict=True)]
    parts = [x.where(v, 0.0) / d.square() for x, v, d in zip((ss, tt), varies, deviations, strict=True)]
    common = st.where(varies[0] & varies[1], 0.0) / (deviations[0] * deviations[1])
    difference: Tensor = (parts[0] + parts[1] - 2 * common).sum() / (2 * n * len(s))
    return difference
