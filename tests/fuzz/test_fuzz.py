"""Every kind of file, mutated a few dozen times: success or one sentence, and no fault."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS, attempt

TRIES = {"--set": 20, "recipe.yaml": 40, "study.yaml": 40, "run.json": 40, "onnx metadata": 60, "best.pt": 40}
SLOW = ("last.pt", "last.pt to the end", "megvii.pth", "mmdetection.pth", "files of a run")


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in SLOW])
def test_the_right_content_is_a_success(name: str, tmp_path: Path) -> None:
    TARGETS[name].use(TARGETS[name].base(), tmp_path)


@pytest.mark.parametrize("name", TRIES)
def test_a_mutated_file_is_a_success_or_a_sentence(name: str, tmp_path: Path) -> None:
    ends = [attempt(name, seed, tmp_path) for seed in range(TRIES[name])]
    faults = [(said, repr(fault)) for said, end, fault in ends if end == "fault"]
    assert not faults
    assert {"success", "sentence"} <= {end for _, end, _ in ends} | {"success"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_mutated_file_of_the_slower_kinds_too(name: str, tmp_path: Path) -> None:
    TARGETS[name].use(TARGETS[name].base(), tmp_path)
    faults = [
        (said, repr(fault)) for said, end, fault in (attempt(name, s, tmp_path) for s in range(12)) if end == "fault"
    ]
    assert not faults


def test_mutations_change_a_copy_and_are_repeated_by_their_seed() -> None:
    base = {"a": [1, {"b": torch.ones(2)}], "c": ("x", "y")}
    found = [mutated(base, random.Random(seed))[1] for seed in range(50)]
    assert found == [mutated(base, random.Random(seed))[1] for seed in range(50)]
    assert len(set(found)) > 20
    assert torch.equal(base["a"][1]["b"], torch.ones(2))  # type: ignore[index]
    assert list(base) == ["a", "c"]
