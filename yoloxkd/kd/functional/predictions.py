"""What two dense detectors predict at the same places, and how far apart it is.

Legend: B images, N predictions, K classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from yoloxkd.errors import UserError
from yoloxkd.kd.functional.importance import touched_by_any
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.pairing import Pairing
from yoloxkd.ops.boxes import paired_giou, to_center
from yoloxkd.ops.points import within_content
from yoloxkd.types import Batch, DenseOutput, Grid


class _ScoreDivergence(Function):
    """The gradient is linear in what comes in for each row, so that the forward pass writes down its map."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_probability: Tensor, power: float) -> tuple[Tensor, Tensor]:
        p = logits.sigmoid()
        apart = p - teacher_probability
        distance = apart.abs()
        largest = distance.amax(-1)
        entropy = F.softplus(logits).addcmul_(logits, teacher_probability, value=-1)
        slope = p.mul_(1 - p).mul_(apart.sign())  # of the distance
        if power != 1:
            slope.mul_(power * distance.pow(power - 1))
            distance = distance.pow_(power)
        ctx.save_for_backward(slope.mul_(entropy).addcmul_(apart, distance))
        ctx.mark_non_differentiable(largest)
        return entropy.mul_(distance).sum(-1), largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0].unsqueeze(-1), None, None


@without_autocast
def score_divergence(logits: Tensor, teacher_probability: Tensor, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """Binary cross entropy against the teacher's probabilities, weighted by how far the student is from them.

    BCKD (Yang et al., ICCV 2023): BCE(z, q) |sigmoid(z) - q|^power, summed over classes; the weight is in the gradient.

    Args:
        logits: (..., K) of the student.
        teacher_probability: (..., K).
        power: at least 1.

    Returns:
        The sums (...), and the largest |sigmoid(z) - q| over classes (...), without gradient.
    """
    result: tuple[Tensor, Tensor] = _ScoreDivergence.apply(
        full_precision(logits), full_precision(teacher_probability).detach(), power
    )
    return result


@without_autocast
def box_divergence(student: Tensor, teacher: Tensor, strides: Tensor) -> Tensor:
    """1 - GIoU of boxes paired row by row, in strides: (..., N, 4) px each and (N,) px -> (..., N)."""
    scale = strides.unsqueeze(-1)
    return 1 - paired_giou(full_precision(student) / scale, full_precision(teacher).detach() / scale)


@without_autocast
def box_code(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Shift of the center and logarithm of the sides, in anchor sides: (..., 4) px each -> (..., 4).

    A side counts as at least a pixel.
    """
    center, side = to_center(full_precision(boxes)).split(2, -1)
    of, unit = to_center(full_precision(anchors)).split(2, -1)
    unit = unit.clamp_min(1.0)
    return torch.cat([(center - of) / unit, (side.clamp_min(1.0) / unit).log()], -1)


@without_autocast
def joint_logits(classes: Tensor, objectness: Tensor) -> Tensor:
    """The logit of sigmoid(class) times sigmoid(objectness): (..., K) and (...) -> (..., K)."""
    o = full_precision(objectness).unsqueeze(-1)
    return o - F.softplus(F.softplus(o) - full_precision(classes))


def counted_locations(grid: Grid, batch: Batch) -> Tensor:
    """(B, A) bool: predictions that are neither on padding nor in an ignore region."""
    ignored = touched_by_any(grid.points, batch.targets.boxes, batch.targets.ignore)
    return within_content(grid.points, batch.content) & ~ignored


class LevelPredictions(NamedTuple):
    """What a detector predicts at N places.

    logits (B, N, K) whose sigmoids are the class probabilities; boxes (B, N, 4) px; quality (B, N) logits or None
    """

    logits: Tensor
    boxes: Tensor
    quality: Tensor | None

    @classmethod
    def at(cls, out: DenseOutput, part: slice, objectness: bool, per_cell: int) -> LevelPredictions:
        """The predictions of a level.

        Args:
            part: where the level's predictions are among all.
            objectness: whether a class's probability is its own times that of any object.
            per_cell: how many to take of each cell: as many as there are, or the most probable one alone.
        """
        logits, boxes = full_precision(out.cls_logits[:, part]), out.boxes[:, part]
        quality = None if out.quality is None else full_precision(out.quality[:, part])
        if objectness:
            assert quality is not None
            logits = joint_logits(logits, quality)
        predictions = cls(logits, boxes, quality)
        return predictions if per_cell == out.grid.per_cell else predictions.most_probable(out.grid.per_cell)

    def most_probable(self, per_cell: int) -> LevelPredictions:
        """Of the `per_cell` predictions side by side that are of one cell, the one with the largest class probability."""
        best = self.logits.detach().amax(-1).unflatten(1, (-1, per_cell)).argmax(-1)
        index = best + torch.arange(best.shape[1], device=best.device) * per_cell

        def take_best(x: Tensor) -> Tensor:
            return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))

        quality = None if self.quality is None else self.quality.gather(1, index)
        return LevelPredictions(take_best(self.logits), take_best(self.boxes), quality)


def check_places(name: str, pairing: Pairing) -> None:
    """UserError: what student and teacher predict is not of the same places."""
    for who, spec in (("student", pairing.student), ("teacher", pairing.teacher)):
        if not spec.stable_locations:
            raise UserError(
                f"--kd {name} compares what both predict at the same places, and the {who}'s are of {spec.predicts_for}, "
                f"which are elsewhere; choose another {who}, or a method that compares maps, such as --kd pkd"
            )
    if pairing.teacher_scale != 1:
        raise UserError(
            f"--kd {name} compares what both predict at the same places, and with teacher.scale {pairing.teacher_scale:g} the "
            "teacher has others; set it to 1, or choose another --kd"
        )
