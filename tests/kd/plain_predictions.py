"""The methods that compare predictions as their formulas read: one image, one prediction and one class at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from yoloxkd.kd.base import Step
from yoloxkd.kd.methods.crosskd import CrossKD
from yoloxkd.kd.methods.response import Response
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.types import DenseOutput, Tap


def giou(a: Tensor, b: Tensor) -> float:
    """Of two boxes (4,)."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.tolist(), b.tolist()
    areas = max(0.0, ax2 - ax1) * max(0.0, ay2 - ay1) + max(0.0, bx2 - bx1) * max(0.0, by2 - by1)
    inner = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = max(areas - inner, 1e-6)
    hull = max((max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1)), 1e-6)
    return inner / union - (hull - union) / hull


def weighted_entropy(p: float, q: float) -> float:
    """Cross entropy of the student's probability p against the teacher's q, times how far apart they are."""
    return -(q * math.log(p) + (1 - q) * math.log1p(-p)) * abs(p - q)


def response_by_prediction(method: Response, step: Step[DenseOutput]) -> dict[str, Tensor]:
    """`Response.compare` of detectors with the same classes, before it is divided."""
    student, teacher = step.student, step.teacher
    models = step.models
    ours, theirs = (m.class_probability(out).double() for m, out in zip(models, (student, teacher), strict=True))
    out = {f"{term}/s{stride}": torch.zeros(()) for stride in student.grid.strides for term in method.weights}
    for b in range(ours.shape[0]):
        for a in range(ours.shape[1]):
            stride = int(student.grid.point_strides[a])
            pairs = list(zip(ours[b, a].tolist(), theirs[b, a].tolist(), strict=True))
            out[f"classes/s{stride}"] += method.cfg.alpha * sum(weighted_entropy(p, q) for p, q in pairs)
            far = max(abs(p - q) for p, q in pairs)
            wrong = 1 - giou(student.boxes[b, a].double() / stride, teacher.boxes[b, a].double() / stride)
            out[f"boxes/s{stride}"] += method.cfg.beta * wrong * far
            if "objectness" in method.weights:
                assert student.quality is not None
                assert teacher.quality is not None
                p, q = (float(x.quality[b, a].detach().double().sigmoid()) for x in (student, teacher))
                out[f"objectness/s{stride}"] += method.cfg.gamma * weighted_entropy(p, q)
    return out


def crosskd_by_prediction(method: CrossKD, step: Step[DenseOutput]) -> dict[str, Tensor]:
    """`CrossKD.compare` of detectors with the same levels and channels, at position 1."""
    teacher = step.models.teacher
    assert isinstance(teacher, DenseDetector)
    ends = [teacher.tower(tap, tuple(x.detach() for x in getattr(step.student, tap)), 1) for tap in (Tap.CLS, Tap.REG)]
    crossed, said = teacher.assemble(teacher.predict(*ends), step.teacher.image_size), step.teacher
    p_all, q_all = (teacher.class_probability(out).double() for out in (crossed, said))
    out = {f"{term}/s{stride}": torch.zeros(()) for stride in said.grid.strides for term in method.weights}
    count = max(1, int(step.match.fg.sum()))
    for b in range(p_all.shape[0]):
        for a in range(p_all.shape[1]):
            stride = int(said.grid.point_strides[a])
            pairs = zip(p_all[b, a].tolist(), q_all[b, a].tolist(), strict=True)
            out[f"classes/s{stride}"] += method.cfg.alpha * sum(weighted_entropy(p, q) for p, q in pairs)
            if step.match.fg[b, a]:
                wrong = 1 - giou(crossed.boxes[b, a].double() / stride, said.boxes[b, a].double() / stride)
                out[f"boxes/s{stride}"] += method.cfg.beta * wrong
            if "quality" in method.weights:
                assert crossed.quality is not None
                assert said.quality is not None
                p, q = (float(x.quality[b, a].detach().double().sigmoid()) for x in (crossed, said))
                out[f"quality/s{stride}"] += method.cfg.gamma * weighted_entropy(p, q)
    return {name: total.detach() / count for name, total in out.items()}
