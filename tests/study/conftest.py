"""A study of seconds on the toy data: one narrow student, two seeds, a teacher that is there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TINY

SETTINGS = TINY | {
    "train.batch": 4,
    "train.imgsz": 64,
    "engine.device": "cpu",
    "augment.mosaic": 0.0,
    "val.interval": 1,
}


def definition(data: Path | str, teacher: Path | str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": str(data),
        "epochs": 1,
        "seeds": [0],
        "settings": dict(SETTINGS),
        "teacher": {"file": str(teacher)},
        "students": {"nano": "yolox-nano"},
        "methods": {"none": None, "pgd": {"kd": "pgd"}},
    } | changes


def write(folder: Path, value: dict[str, Any]) -> str:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(value, sort_keys=False))
    return str(file)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """For what is decided before a run begins: nothing of this is on disk."""
    return definition("no-such-data.yaml", "no-such-teacher.pt")
