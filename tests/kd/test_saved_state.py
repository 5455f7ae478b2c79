"""A checkpoint of another distillation, or one that was changed, is refused before the first step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.kd.fakes import TinyDetector
from yoloxkd.errors import UserError
from yoloxkd.kd.base import Teacher
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.methods.pgd import PGDConfig
from yoloxkd.kd.saved_state import SavedDistillation

SAVED: dict[str, Any] = {
    "teachers": [{"source": "a.pt", "digest": "ab", "ap": None, "later": 1}],
    "auto": {"pgd": {"fixed": None, "seen": 1, "task": torch.tensor(1.0), "own": torch.tensor(2.0)}},
    "nonfinite": [torch.zeros(3, dtype=torch.int64)],
}
DROP = object()


def teacher(digest: str = "ab") -> Teacher:
    return Teacher(TinyDetector(), "a.pt", digest, 1.0)


def test_the_same_distillation_goes_on() -> None:
    saved = SavedDistillation.model_validate(SAVED)
    saved.check_teachers([teacher()], ["pgd", "fgd"])
    saved.check_counts([3])
    SavedDistillation(teachers=saved.teachers).check_counts([3])
    SavedDistillation(teachers=saved.teachers, nonfinite=[None]).check_counts([3])


def test_another_distillation_is_one_sentence() -> None:
    saved = SavedDistillation.model_validate(SAVED)
    with pytest.raises(UserError, match=r"of 1 teacher\(s\), and the recipe names 2"):
        saved.check_teachers([teacher(), teacher()], ["pgd"])
    with pytest.raises(UserError, match="of pgd, and the recipe names fgd"):
        saved.check_teachers([teacher()], ["fgd"])
    with pytest.raises(UserError, match=r"a\.pt is not the file this run began with"):
        saved.check_teachers([teacher("cd")], ["pgd"])
    for losses in ([2], [3, 3]):
        with pytest.raises(UserError, match=r"of \[3\] terms"):
            saved.check_counts(losses)


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ("teachers", DROP, "its 'teachers' is missing"),
        ("teachers", [5], "its 'teachers.0' should be a valid dictionary"),
        ("teachers/0/digest", None, "its 'teachers.0.digest'"),
        ("auto/pgd/seen", -1, "its 'auto.pgd.seen'"),
        ("auto/pgd/fixed", float("nan"), "its 'auto.pgd.fixed'"),
        ("auto/pgd/task", torch.zeros(2), "its 'auto.pgd.task' should be a number in a tensor"),
        ("nonfinite", [torch.tensor(1)], "its 'nonfinite' should be lists of counts"),
    ],
)
def test_what_was_changed_is_named(path: str, new: Any, message: str) -> None:
    callback = Distill(teacher(), {"pgd": PGDConfig()})
    callback.load_state_dict(SAVED)
    changed = copy.deepcopy(SAVED)
    *parents, last = path.split("/")
    at: Any = changed
    for key in parents:
        at = at[int(key) if isinstance(at, list) else key]
    if new is DROP:
        del at[last]
    else:
        at[last] = new
    with pytest.raises(UserError, match=f"what last.pt has of the callback 'kd' was changed.*{message}") as caught:
        callback.load_state_dict(changed)
    assert "\n" not in str(caught.value)
