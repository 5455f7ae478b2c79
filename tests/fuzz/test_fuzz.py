"""Every kind of file, mutated a few dozen times: success or one sentence, and no fault."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.fuzz import harness
from tests.fuzz.harness import Target, attempt, is_sentence
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS
from yoloxkd.errors import UserError

TRIES = {"--set": 12, "recipe.yaml": 30, "study.yaml": 40, "run.json": 40, "onnx metadata": 60, "best.pt": 6}
TRIES |= dict.fromkeys(
    ("data.yaml", "our data.yaml", "coco.json", "crowdhuman.odgt", "voc.xml", "yolo labels", "yolo poses"), 40
)
SLOW = [name for name in TARGETS if name not in TRIES]


@pytest.mark.parametrize("name", TRIES)
def test_a_mutated_file_is_a_success_or_a_sentence(name: str) -> None:
    check(name, TRIES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_mutated_file_of_the_slower_kinds_too(name: str) -> None:
    check(name, 12)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIES)
def test_more_seeds_of_the_quick_kinds(name: str) -> None:
    check(name, 5 * TRIES[name], first=1000)


def check(name: str, tries: int, first: int = 0) -> None:
    right = attempt(name, TARGETS[name], None)
    assert right.end == "success", str(right)
    found = [attempt(name, TARGETS[name], first + number) for number in range(tries)]
    assert not [str(outcome) for outcome in found if outcome.end == "fault"]
    ends = Counter(outcome.end for outcome in found)
    assert ends["success"], "everything is refused, so nothing behind the first check was tried"
    assert ends["sentence"], "nothing is refused, so nothing was looked at"


def raising(error: Exception) -> Target:
    def use(value: object, folder: Path) -> None:
        raise error

    return Target(lambda: {"a": 1}, use)


def test_what_is_no_sentence_is_a_fault_that_says_how_to_repeat_it() -> None:
    outcome = attempt("x", raising(KeyError("a")), 7)
    assert outcome.end == "fault"
    assert "--only 'x' --seed 7 --tries 1" in str(outcome)
    assert " at a" in str(outcome)
    assert "KeyError('a')" in str(outcome)
    assert attempt("x", raising(UserError("")), 7).end == "fault"
    assert attempt("x", raising(UserError("a" * 2000)), 7).end == "fault"
    assert attempt("x", raising(UserError("Traceback (most recent call last)")), 7).end == "fault"
    assert not is_sentence("two\nlines")
    assert not is_sentence("a tab is \t no sentence")
    assert attempt("x", raising(UserError("'a' should be 2")), 7).end == "sentence"


def test_the_right_content_must_not_be_refused() -> None:
    assert attempt("x", raising(UserError("'a' should be 2")), None).end == "fault"


def test_a_try_has_a_limit_of_processor_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(value: object, folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(harness, "SECONDS", 0.2)
    outcome = attempt("x", Target(dict, busy), 0)
    assert (outcome.end, type(outcome.error)) == ("fault", harness.TooLongError)
    assert attempt("x", Target(dict, lambda value, folder: time.sleep(0.5)), 0).end == "success"


def test_mutations_change_a_copy_and_are_repeated_by_their_seed() -> None:
    base = {"a": [1, {"b": torch.ones(2)}], "c": ("x", "y")}
    found = [mutated(base, random.Random(seed))[1] for seed in range(50)]
    assert found == [mutated(base, random.Random(seed))[1] for seed in range(50)]
    assert len(set(found)) > 20
    assert torch.equal(base["a"][1]["b"], torch.ones(2))  # type: ignore[index]
    assert list(base) == ["a", "c"]
