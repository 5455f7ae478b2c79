"""Localization Distillation (LD, Zheng et al., CVPR 2022): the student's box distributions follow the teacher's.

For detectors that predict, for each side of a box, a distribution over distances (GFL).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.importance import touched_by_any
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.assigners.atss import TOPK, near_misses
from yoloxkd.nn.assigners.match import Positives
from yoloxkd.ops.points import within_content
from yoloxkd.types import Batch, DenseOutput, Loss, Losses, LossName, Tap


class LDConfig(KDConfig):
    """Keys of `kd` for LD."""

    tau: float = published("ld", "tau", gt=0, description="temperature of the distributions")
    alpha: float = published(
        "ld", "alpha", ge=0, description="weight of the divergence at the student's positives (main region)"
    )
    beta: float = published("ld", "beta", ge=0, description="weight of the divergence around them (valuable region)")
    low: float = published(
        "ld", "low", ge=0, le=1, description="where the valuable region ends, as a part of a box's threshold"
    )
    delta: float = published(
        "ld", "delta", ge=0, description="weight of the classes' divergence at the student's positives"
    )
    tau_cls: float = published("ld", "tau_cls", gt=0, description="temperature of the classes")


@without_autocast
def localization_divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau² times the mean over sides and bins of p_T log(p_T / p_S), p the softmax of logits / tau. LD eq. (3).

    student, teacher (..., 4 n) logits of n bins for left, top, right and bottom -> (...). The paper sums over bins; the
    published code takes the mean, and its weights belong to that.
    """
    log_student = (full_precision(student).unflatten(-1, (4, -1)) / tau).log_softmax(-1)
    log_teacher = (full_precision(teacher).detach().unflatten(-1, (4, -1)) / tau).log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).mean((-1, -2)) * (tau * tau)


@without_autocast
def class_divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau² times the mean over classes of p_T log(p_T / p_S), p the softmax over classes of logits / tau.

    student, teacher (..., K) logits -> (...). The detectors' own probabilities are sigmoids; the published code takes
    the softmax all the same.
    """
    log_student = (full_precision(student) / tau).log_softmax(-1)
    log_teacher = (full_precision(teacher).detach() / tau).log_softmax(-1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).mean(-1) * (tau * tau)


class LD(Distiller):
    """LD on every paired level: the sides of boxes in the main and the valuable region, and, if asked for, the classes.

    main      sum over the student's positives, each counting with the student's largest class probability there
    valuable  sum over the valuable region (`near_misses`), each location with its anchor's IoU with the box
    classes  mean over the student's positives of a level, over the classes that the teacher knows
    Each is averaged over images.
    """

    Config = LDConfig
    name: ClassVar[str] = "ld"

    def __init__(self, cfg: LDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        bins = pairing.student.box_code.bins, pairing.teacher.box_code.bins
        for who, count in zip(("student", "teacher"), bins, strict=True):
            if count is None:
                raise UserError(
                    f"--kd ld distils distributions of box sides, which only gfl detectors predict, and the {who} predicts "
                    f"its boxes directly; choose a gfl {who}, or another --kd"
                )
        if bins[0] != bins[1]:
            raise UserError(
                f"--kd ld needs distributions of equal length, and the student has {bins[0]} bins a side, the "
                f"teacher {bins[1]}; give the student the teacher's reg_max"
            )
        if pairing.teacher_scale != 1:
            raise UserError(
                f"--kd ld compares what both say at the same locations, and with teacher.scale {pairing.teacher_scale:g} the "
                "teacher has others; set it to 1, or choose another --kd"
            )
        self.cfg = cfg
        self.needs = frozenset[Tap]()
        weights = {"main": cfg.alpha, "valuable": cfg.beta, "classes": cfg.delta}
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.terms = tuple(LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights)
        is_shared = pairing.classes >= 0
        if cfg.delta > 0 and int(is_shared.sum()) < 2:
            raise UserError("kd.delta distils class probabilities, and the teacher knows fewer than two of the classes")
        self.register_buffer("student_classes", is_shared.nonzero()[:, 0], persistent=False)
        self.register_buffer("teacher_classes", pairing.classes[is_shared], persistent=False)
        self.student_classes: Tensor
        self.teacher_classes: Tensor

    def compare(self, step: Step[DenseOutput]) -> Losses:
        student, teacher, batch = step.student, step.teacher, step.batch
        positives = Positives.of(step.match, batch.targets, student.grid, TOPK * len(student.grid.strides))
        boxes = self._beside(teacher.box_raw, student, teacher)
        terms: Losses = {}
        if "main" in self.weights:
            sides = localization_divergence(positives.at(student.box_raw), positives.at(boxes), self.cfg.tau)
            confidence = positives.at(student.cls_logits.detach()).sigmoid().amax(-1)
            weighted = (sides * confidence).masked_fill(~positives.used, 0)
            terms |= self._by_level("main", weighted, positives.strides)
        if "valuable" in self.weights:
            valuable = localization_divergence(student.box_raw, boxes, self.cfg.tau) * self._valuable(student, batch)
            terms |= self._by_level("valuable", valuable, student.grid.point_strides.expand_as(valuable))
        if "classes" in self.weights:
            logits = self._beside(teacher.cls_logits, student, teacher)
            student_logits = positives.at(student.cls_logits)[..., self.student_classes]
            teacher_logits = positives.at(logits)[..., self.teacher_classes]
            divergence = class_divergence(student_logits, teacher_logits, self.cfg.tau_cls).masked_fill(
                ~positives.used, 0
            )
            terms |= self._by_level("classes", divergence, positives.strides, positives.used)
        return terms

    def _by_level(self, term: str, values: Tensor, strides: Tensor, count: Tensor | None = None) -> Losses:
        """Values (B, N) at locations of strides (B, N) -> the weighted term of each level, the mean over images.

        count (B, N) bool: divide by the number of these at the level, image by image; None: a sum
        """
        out: Losses = {}
        for level in self.pairing.levels:
            here = strides == level.stride
            total = (values * here).sum(1)
            if count is not None:
                total = total / (count & here).sum(1).clamp_min(1)
            out[LossName(self.name, term, level.stride)] = Loss(total.mean() * self.weights[term])
        return out

    def _valuable(self, student: DenseOutput, batch: Batch) -> Tensor:
        """(B, A) weight of each of the student's locations in the valuable region; none on padding or ignore regions."""
        near = near_misses(student.grid, batch.targets, low=self.cfg.low)
        ignored = touched_by_any(student.grid.points, batch.targets.boxes, batch.targets.ignore)
        return near * (within_content(student.grid.points, batch.content) & ~ignored)

    def _beside(self, values: Tensor, student: DenseOutput, teacher: DenseOutput) -> Tensor:
        """What the teacher says (B, teacher's A, R) at the student's locations (B, A, R); zero on unpaired levels."""
        slices = teacher.grid.slices()
        by_level = {level.student: values[:, slices[level.teacher]] for level in self.pairing.levels}
        empty = torch.zeros_like(values[:, :1])
        parts = enumerate(student.grid.slices())
        return torch.cat([by_level.get(i, empty.expand(-1, part.stop - part.start, -1)) for i, part in parts], 1)
