"""What a distillation keeps in last.pt, and whether that belongs to the distillation that goes on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor

from yoloxkd.engine.checkpoint_parts import Count, Finite, SavedPart
from yoloxkd.errors import UserError
from yoloxkd.kd.base import Teacher

_OF = "the checkpoint cannot be resumed, it was changed or is of another run; its distillation is of"


class TeacherRecord(SavedPart):
    """A teacher of the run, for checkpoints, environment.json and the report.

    Attributes:
        source: File or name, as the user gave it.
        digest: SHA-256 of the weights' file, hex.
        share: Of its parameters that came from the file, 0 to 1.
        weight: Factor on everything it teaches.
        ap: In the classes it knows, 0 to 1; None: not measured.
        plan: `Pairing.as_dict()`.
        table: `Pairing.describe()`.
    """

    source: str
    digest: str
    share: Finite = 1.0
    weight: Finite = 1.0
    ap: float | None
    plan: dict[str, Any] = {}
    table: list[list[str]] = []


class SavedWeight(SavedPart):
    """As `MethodWeight.state_dict`."""

    fixed: Finite | None
    seen: Count
    task: Tensor | None
    own: Tensor | None

    @field_validator("task", "own")
    @classmethod
    def _sum(cls, value: Tensor | None) -> Tensor | None:
        if value is not None and (value.ndim or not value.is_floating_point() or not value.isfinite()):
            raise ValueError("should be a number in a tensor")
        return value


class SavedDistillation(SavedPart):
    """As `Distill.state_dict`.

    Attributes:
        teachers: One for each, in the order in which the user gave them.
        auto: Of each method with an automatic weight what it has measured.
        nonfinite: Of each teacher how often each of its losses was not finite, (losses,) int64.
    """

    teachers: list[TeacherRecord]
    auto: dict[str, SavedWeight] = {}
    nonfinite: list[Tensor | None] = []

    @field_validator("nonfinite")
    @classmethod
    def _counts(cls, value: list[Tensor | None]) -> list[Tensor | None]:
        if any(count is not None and (count.ndim != 1 or count.dtype != torch.int64) for count in value):
            raise ValueError("should be lists of counts in tensors")
        return value

    def check_teachers(self, teachers: Sequence[Teacher], methods: Collection[str]) -> None:
        """Refuse to go on with other teachers or methods.

        Args:
            teachers: Those of the recipe.
            methods: Names of the recipe's methods.

        Raises:
            UserError: It had another number of teachers, others, or other methods.
        """
        if len(self.teachers) != len(teachers):
            raise UserError(f"{_OF} {len(self.teachers)} teacher(s), and the recipe names {len(teachers)}")
        if others := [name for name in self.auto if name not in methods]:
            raise UserError(f"{_OF} {', '.join(others)}, and the recipe names {', '.join(methods)}")
        for teacher, old in zip(teachers, self.teachers, strict=True):
            if old.digest != teacher.digest:
                raise UserError(
                    f"the teacher {teacher.source} is not the file this run began with (its digest is "
                    f"{teacher.digest[:12]}, and was {old.digest[:12]} of {old.source}); "
                    "put the old file back, or start a new run"
                )

    def check_counts(self, losses: Sequence[int]) -> None:
        """Refuse counts of other losses.

        Args:
            losses: How many each teacher's module has.

        Raises:
            UserError: It counted others.
        """
        counted = [None if count is None else len(count) for count in self.nonfinite]
        if counted and (
            len(counted) != len(losses) or any(n not in (None, m) for n, m in zip(counted, losses, strict=True))
        ):
            raise UserError(f"{_OF} {counted} terms, and the recipe's has {list(losses)}")
