"""Which part of the student learns from which part of the teacher, decided once, before training, and printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.at_scale import AtScale, plain
from yoloxkd.nn.detector import DenseDetector, Taps

TAP_NAMES = {"features": "neck", "cls_features": "cls", "reg_features": "reg"}


@dataclass(frozen=True, slots=True)
class LevelPair:
    """Two levels of equal stride: indices into the student's and the teacher's levels."""

    stride: int
    student: int
    teacher: int


@dataclass(frozen=True)
class Pairing:
    """The plan: levels by stride, channels by adapters, sizes by resizing, classes by name.

    levels        pairs, finest first
    classes       (student classes,) int64: the teacher's index of each student class, -1 where the teacher has none
    taught        (student classes,) bool: classes whose objects this teacher answers for; all, but with several teachers
    bins          (student's, teacher's) logits of the distribution of each side of a box; None: predicted directly
    nominal_size  px, the side of the training input before multi-scale; None when it does not vary
    teacher_scale the teacher sees the batch at this multiple of its size
    """

    levels: tuple[LevelPair, ...]
    student_levels: tuple[int, ...]
    teacher_levels: tuple[int, ...]
    student_taps: Taps
    teacher_taps: Taps
    student_names: tuple[str, ...]
    teacher_names: tuple[str, ...]
    student_input: str
    teacher_input: str
    classes: Tensor = field(compare=False)
    taught: Tensor = field(compare=False)
    bins: tuple[int | None, int | None] = (None, None)
    nominal_size: int | None = None
    teacher_scale: float = 1.0

    @classmethod
    def between(cls, student: DenseDetector, teacher: DenseDetector, nominal_size: int | None = None) -> Pairing:
        """Pair two detectors; UserError when they have no stride in common."""
        common = sorted(set(student.levels) & set(teacher.levels))
        if not common:
            raise UserError(
                f"student and teacher have no stride in common (student {list(student.levels)}, teacher "
                f"{list(teacher.levels)}), so no feature level can be distilled; "
                "choose a teacher with one of the student's strides"
            )
        return cls(
            levels=tuple(LevelPair(s, student.levels.index(s), teacher.levels.index(s)) for s in common),
            student_levels=tuple(student.levels),
            teacher_levels=tuple(teacher.levels),
            student_taps=student.taps,
            teacher_taps=teacher.taps,
            student_names=tuple(student.names),
            teacher_names=tuple(teacher.names),
            student_input=student.input.describe(),
            teacher_input=teacher.input.describe(),
            classes=match_classes(student.names, teacher.names),
            taught=torch.ones(len(student.names), dtype=torch.bool),
            bins=(_bins(student), _bins(teacher)),
            nominal_size=nominal_size,
            teacher_scale=teacher.scale if isinstance(teacher, AtScale) else 1.0,
        )

    def channels(self, tap: str, level: LevelPair) -> tuple[int, int]:
        """(student's, teacher's) channels of a tap at a paired level."""
        return getattr(self.student_taps, tap)[level.student], getattr(self.teacher_taps, tap)[level.teacher]

    @property
    def known_classes(self) -> int:
        """How many of the student's classes the teacher knows."""
        return int((self.classes >= 0).sum())

    def describe(self, taps: Iterable[str]) -> list[tuple[str, str, str, str]]:
        """Rows of the plan's table: what, student, teacher, how they are brought together."""
        rows = []
        for tap in taps:
            for level in self.levels:
                s, t = self.channels(tap, level)
                how = "as they are" if s == t else "1x1 adapter"
                rows.append((f"{TAP_NAMES[tap]} stride {level.stride}", f"{s} ch", f"{t} ch", how))
        paired = {level.stride for level in self.levels}
        for side, levels in (("student", self.student_levels), ("teacher", self.teacher_levels)):
            for stride in sorted(set(levels) - paired):
                there = ("yes", "-") if side == "student" else ("-", "yes")
                rows.append((f"stride {stride}", *there, f"not distilled: only the {side} has it"))
        n = len(self.student_names)
        rows.append(("classes", str(n), str(len(self.teacher_names)), self._class_note()))
        if not bool(self.taught.all()):
            rows.append(("objects", str(n), "-", self._taught_note()))
        rows.append(("input", self.student_input, self.teacher_input, "each normalises the same RGB batch"))
        if self.teacher_scale != 1:
            rows.append(("size", "1", f"{self.teacher_scale:g}", "the student's maps are resized to the teacher's"))
        return rows

    def _class_note(self) -> str:
        missing = [n for n, i in zip(self.student_names, self.classes.tolist(), strict=True) if i < 0]
        if not missing:
            return "all known to the teacher, by name"
        return f"{self.known_classes} known to the teacher; by localisation only: {_some(missing)}"

    def _taught_note(self) -> str:
        names = [n for n, own in zip(self.student_names, self.taught.tolist(), strict=True) if own]
        return f"this teacher's: {_some(names)}" if names else "this teacher's: none, the others know them all"

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain containers, for checkpoints."""
        return {
            "strides": [level.stride for level in self.levels],
            "student_levels": list(self.student_levels),
            "teacher_levels": list(self.teacher_levels),
            "channels": {tap: [list(self.channels(tap, level)) for level in self.levels] for tap in TAP_NAMES},
            "classes": self.classes.tolist(),
            "taught": self.taught.tolist(),
            "student_names": list(self.student_names),
            "teacher_names": list(self.teacher_names),
            "student_input": self.student_input,
            "teacher_input": self.teacher_input,
            "nominal_size": self.nominal_size,
            "teacher_scale": self.teacher_scale,
        }


def share_classes(plans: Sequence[Pairing]) -> list[Pairing]:
    """Give every student class to one of several teachers of the same student: the first that knows it, else the first."""
    known = torch.stack([plan.classes >= 0 for plan in plans])
    owner = known.int().argmax(0)  # the first of the largest; 0 where nobody knows the class
    return [replace(plan, taught=owner == i) for i, plan in enumerate(plans)]


def match_classes(student: Iterable[str], teacher: Iterable[str]) -> Tensor:
    """Teacher index of each student class name, -1 where it has none: (student classes,) int64.

    Names agree when they are equal apart from case, and from spaces, hyphens and underscores.
    """
    index: dict[str, int] = {}
    for i, name in enumerate(teacher):
        index.setdefault(_plain(name), i)
    return torch.tensor([index.get(_plain(name), -1) for name in student], dtype=torch.int64)


def _bins(detector: DenseDetector) -> int | None:
    reg_max = getattr(getattr(plain(detector), "cfg", None), "reg_max", None)
    return None if reg_max is None else reg_max + 1


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c not in " -_")


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Rows as aligned text under a header."""
    full = [("distillation", "student", "teacher", "how"), *rows]
    widths = [max(len(row[i]) for row in full) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in full
    )
