"""Pairing of student and teacher: levels, channels and classes, decided before training and printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.nn.detector import Detector, DetectorSpec
from yoloxkd.types import Tap


@dataclass(frozen=True, slots=True)
class LevelPair:
    """Two levels of equal stride: indices into the student's and the teacher's levels."""

    stride: int
    student: int
    teacher: int


@dataclass(frozen=True)
class Pairing:
    """The plan: levels by stride, channels by adapters, sizes by resizing, classes by name.

    Attributes:
        levels: pairs, finest first
        classes: (student classes,) int64: the teacher's index of each student class, -1 where the teacher has
            none
        taught: (student classes,) bool: classes whose objects this teacher answers for; all, but with several
            teachers
        nominal_size: px, the side of the training input before multi-scale; None when it does not vary
        teacher_scale: the teacher sees the batch at this multiple of its size
    """

    levels: tuple[LevelPair, ...]
    student: DetectorSpec
    teacher: DetectorSpec
    classes: Tensor = field(compare=False)
    taught: Tensor = field(compare=False)
    nominal_size: int | None = None
    teacher_scale: float = 1.0

    @classmethod
    def between(
        cls, student: Detector[Any, Any], teacher: Detector[Any, Any], nominal_size: int | None = None
    ) -> Pairing:
        """Pair two detectors; UserError when they have no stride in common."""
        student_spec, teacher_spec = student.spec, teacher.spec
        levels = _paired(student_spec.strides, teacher_spec.strides)
        if not levels:
            raise UserError(
                f"student and teacher have no stride in common (student {list(student_spec.strides)}, teacher "
                f"{list(teacher_spec.strides)}), so no feature level can be distilled; "
                "choose a teacher with one of the student's strides"
            )
        return cls(
            levels=levels,
            student=student_spec,
            teacher=teacher_spec,
            classes=match_classes(student_spec.names, teacher_spec.names),
            taught=torch.ones(len(student_spec.names), dtype=torch.bool),
            nominal_size=nominal_size,
            teacher_scale=teacher.scale if isinstance(teacher, RescaledTeacher) else 1.0,
        )

    def levels_of(self, tap: Tap) -> tuple[LevelPair, ...]:
        """The pairs of a tap's maps: `levels`, but for the backbone. UserError: one of the two has no such maps."""
        for who, spec in (("student", self.student), ("teacher", self.teacher)):
            if tap not in spec.channels:
                raise UserError(
                    f"the {who} has no {tap.name.lower()} maps to distil; choose another {who}, or another --kd"
                )
        if tap != Tap.BACKBONE:
            return self.levels
        return _paired(list(self.student.channels[tap]), list(self.teacher.channels[tap]))

    def channels(self, tap: Tap, level: LevelPair) -> tuple[int, int]:
        """(student's, teacher's) channels of a tap at a paired level."""
        return self.student.channels[tap][level.stride], self.teacher.channels[tap][level.stride]

    @property
    def known_classes(self) -> int:
        """How many of the student's classes the teacher knows."""
        return int((self.classes >= 0).sum())

    def describe(self, taps: Iterable[Tap], adapted: Sequence[str] = ()) -> list[tuple[str, str, str, str]]:
        """Rows of the plan's table: what, student, teacher, how they are brought together.

        Args:
            adapted: methods with a 3x3 adapter on every level of the neck
        """
        rows = []
        wide = f"; 3x3 adapter of {', '.join(adapted)}" if adapted else ""
        for tap in taps:
            for level in self.levels_of(tap):
                s, t = self.channels(tap, level)
                how = ("as they are" if s == t else "1x1 adapter") + (wide if tap == Tap.NECK else "")
                rows.append((f"{tap.name.lower()} stride {level.stride}", f"{s} ch", f"{t} ch", how))
        paired = {level.stride for level in self.levels}
        for side, levels in (("student", self.student.strides), ("teacher", self.teacher.strides)):
            for stride in sorted(set(levels) - paired):
                there = ("yes", "-") if side == "student" else ("-", "yes")
                rows.append((f"stride {stride}", *there, f"not distilled: only the {side} has it"))
        n = len(self.student.names)
        rows.append(("classes", str(n), str(len(self.teacher.names)), self._class_note()))
        if not bool(self.taught.all()):
            rows.append(("objects", str(n), "-", self._taught_note()))
        rows.append(
            (
                "input",
                self.student.input.describe(),
                self.teacher.input.describe(),
                "each normalizes the same RGB batch",
            )
        )
        if self.teacher_scale != 1:
            rows.append(("size", "1", f"{self.teacher_scale:g}", "the student's maps are resized to the teacher's"))
        return rows

    def _class_note(self) -> str:
        missing = [n for n, i in zip(self.student.names, self.classes.tolist(), strict=True) if i < 0]
        if not missing:
            return "all known to the teacher, by name"
        return f"{self.known_classes} known to the teacher; by localization only: {_some(missing)}"

    def _taught_note(self) -> str:
        names = [n for n, taught in zip(self.student.names, self.taught.tolist(), strict=True) if taught]
        return f"this teacher's: {_some(names)}" if names else "this teacher's: none, the others know them all"

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain containers, for checkpoints."""
        return {
            "strides": [level.stride for level in self.levels],
            "student_levels": list(self.student.strides),
            "teacher_levels": list(self.teacher.strides),
            "channels": {
                str(tap): [list(self.channels(tap, level)) for level in self.levels_of(tap)]
                for tap in self.student.channels
                if tap in self.teacher.channels
            },
            "classes": self.classes.tolist(),
            "taught": self.taught.tolist(),
            "student_names": list(self.student.names),
            "teacher_names": list(self.teacher.names),
            "student_input": self.student.input.describe(),
            "teacher_input": self.teacher.input.describe(),
            "nominal_size": self.nominal_size,
            "teacher_scale": self.teacher_scale,
        }


def divide_classes(plans: Sequence[Pairing]) -> list[Pairing]:
    """Give every student class to one of several teachers of the same student: the first that knows it, else the first."""
    knows = torch.stack([plan.classes >= 0 for plan in plans])
    owner = knows.int().argmax(0)  # the first of the largest; 0 where nobody knows the class
    return [replace(plan, taught=owner == i) for i, plan in enumerate(plans)]


def match_classes(student: Iterable[str], teacher: Iterable[str]) -> Tensor:
    """Teacher index of each student class name, -1 where it has none: (student classes,) int64.

    Names agree when they are equal apart from case, and from spaces, hyphens and underscores.
    """
    index: dict[str, int] = {}
    for i, name in enumerate(teacher):
        index.setdefault(_normalized_name(name), i)
    return torch.tensor([index.get(_normalized_name(name), -1) for name in student], dtype=torch.int64)


def _paired(student: Sequence[int], teacher: Sequence[int]) -> tuple[LevelPair, ...]:
    """Levels by their strides."""
    common = sorted(set(student) & set(teacher))
    return tuple(LevelPair(s, student.index(s), teacher.index(s)) for s in common)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _normalized_name(name: str) -> str:
    return "".join(c for c in name.casefold() if c not in " -_")


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Rows as aligned text under a header."""
    full = [("distillation", "student", "teacher", "how"), *rows]
    widths = [max(len(row[i]) for row in full) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in full
    )
