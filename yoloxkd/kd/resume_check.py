"""Check that a checkpoint's distillation state belongs to this distillation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from yoloxkd.errors import UserError

_OF = "the checkpoint cannot be resumed, it was changed or is of another run; its distillation is of"


def check_teachers(saved: Mapping[str, Any], teachers: Sequence[str], methods: Collection[str]) -> None:
    """UserError: it had another number of teachers, or other methods.

    saved     extra.kd of a last.pt, checked by `engine.saved`
    teachers  files of the recipe's teachers
    methods   names of the recipe's methods
    """
    if len(saved["teachers"]) != len(teachers):
        raise UserError(f"{_OF} {len(saved['teachers'])} teacher(s), and the recipe names {len(teachers)}")
    if others := [name for name in saved.get("auto", {}) if name not in methods]:
        raise UserError(f"{_OF} {', '.join(others)}, and the recipe names {', '.join(methods)}")


def check_counts(saved: Mapping[str, Any], terms: Sequence[int]) -> None:
    """UserError: it counted other terms. `terms`: how many each teacher's module has."""
    counted = [None if count is None else len(count) for count in saved.get("nonfinite", [])]
    if counted and (len(counted) != len(terms) or any(n not in (None, m) for n, m in zip(counted, terms, strict=True))):
        raise UserError(f"{_OF} {counted} terms, and the recipe's has {list(terms)}")
