"""Label assignment distillation (LAD, Nguyen et al., WACV 2022): the teacher's predictions decide who answers for what.

It adds no loss. The student's own assigner reads the teacher's predictions instead of the student's, and the student trains on
the labels that come of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.functional.predictions import LevelPredictions, check_places
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DenseOutput, Losses, Tap

OF_LABELS = ("stop_epoch", "inherit")
"""Keys of `kd` that mean something without a loss."""
CERTAIN = 20.0
"""The quality logit of a teacher that has no quality: a probability of one."""


class LADConfig(KDConfig):
    """Keys of `kd` for LAD."""

    @model_validator(mode="after")
    def _no_loss(self) -> Self:
        for key, field in KDConfig.model_fields.items():
            if key not in OF_LABELS and getattr(self, key) != field.default:
                raise ValueError(f"{key} belongs to a loss, and lad gives labels instead of one: leave {key} out")
        return self


class LAD(Distiller):
    """Labels by the student's assigner on the teacher's predictions at the student's places, for its classes by name."""

    Config = LADConfig
    name: ClassVar[str] = "lad"
    counted = True
    labels = True

    def __init__(self, cfg: LADConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        student, teacher = pairing.student, pairing.teacher
        if not student.reads_predictions:
            raise UserError(
                "--kd lad lets the student's assigner read the teacher's predictions, and this student's assigner reads none, the "
                "boxes and the grid alone decide; choose a yolox student, or another --kd"
            )
        check_places(self.name, pairing)
        if missing := [s for s in student.strides if s not in teacher.strides]:
            raise UserError(
                f"--kd lad needs the teacher's predictions on every level of the student, and the teacher has none at stride "
                f"{missing[0]}; choose another teacher, or another --kd"
            )
        if unknown := [n for n, i in zip(student.names, pairing.classes.tolist(), strict=True) if i < 0]:
            raise UserError(
                f"--kd lad takes the labels of every class from the teacher, which does not know '{unknown[0]}'; choose a teacher "
                "that knows all classes, by name, or another --kd"
            )
        if not bool(pairing.taught.all()):
            raise UserError("--kd lad takes the labels from one teacher; give one --teacher, or another --kd")
        self.needs = frozenset[Tap]()
        self.terms = ()
        self.register_buffer("classes", pairing.classes.clone(), persistent=False)
        self.classes: Tensor

    def compare(self, step: Step[DenseOutput]) -> Losses:
        return {}

    def assigned_from(self, student: DenseOutput, teacher: Any) -> DenseOutput:
        """The teacher's predictions in the student's order of levels and classes."""
        slices, per_cell = teacher.grid.slices(), student.grid.per_cell
        by_stride = {level.student: slices[level.teacher] for level in self.pairing.levels}
        predictions = [
            LevelPredictions.at(teacher, by_stride[i], False, per_cell) for i in range(len(student.grid.strides))
        ]
        sure = [torch.full_like(s.logits[..., 0], CERTAIN) if s.quality is None else s.quality for s in predictions]
        return replace(
            student,
            cls_logits=torch.cat([s.logits for s in predictions], 1)[..., self.classes],
            boxes=torch.cat([s.boxes for s in predictions], 1),
            quality=torch.cat(sure, 1),
        )
