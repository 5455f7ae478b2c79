"""A checkpoint of another distillation is refused before its first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from yoloxkd.errors import UserError
from yoloxkd.kd.resume_check import check_counts, check_teachers

SAVED: dict[str, Any] = {"teachers": [{}], "auto": {"pgd": {}}, "nonfinite": [torch.zeros(3, dtype=torch.int64)]}


def test_the_same_distillation_goes_on() -> None:
    check_teachers(SAVED, ["a.pt"], ["pgd", "fgd"])
    check_counts(SAVED, [3])
    check_counts({}, [3])
    check_counts({"nonfinite": [None]}, [3])


def test_another_distillation_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"of 1 teacher\(s\), and the recipe names 2"):
        check_teachers(SAVED, ["a.pt", "b.pt"], ["pgd"])
    with pytest.raises(UserError, match="of pgd, and the recipe names fgd"):
        check_teachers(SAVED, ["a.pt"], ["fgd"])
    for terms in ([2], [3, 3]):
        with pytest.raises(UserError, match=r"of \[3\] terms"):
            check_counts(SAVED, terms)
