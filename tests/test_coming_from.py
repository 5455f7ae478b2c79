"""Every line that docs/coming-from.md gives as ours is executed, at toy size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, TINY
from tests.test_examples import folder as folder  # the working folder that the lines name
from yoloxkd.api import detector, trainer
from yoloxkd.cli import run

PAGE = REPOSITORY / "docs" / "coming-from.md"
SMALL = {r"--epochs \d+": "--epochs 1", r"--batch \d+": "--batch 4", r"--imgsz \d+": "--imgsz 64"}


def lines() -> list[str]:
    """The last cell of every row of every table."""
    rows = [row for row in PAGE.read_text("utf-8").splitlines() if row.startswith("| ")]
    cells = [re.findall(r"`([^`]+)`", row.rstrip(" |").split(" | ")[-1]) for row in rows]
    return [code for row in cells for code in row]


def commands() -> list[str]:
    return [line for line in lines() if line.startswith("yoloxkd ")]


def test_every_row_has_one_line_of_ours() -> None:
    rows = [
        row for row in PAGE.read_text("utf-8").splitlines() if row.startswith("| ") and not row.startswith("| what")
    ]
    assert len(lines()) == len(rows) > 30


@pytest.mark.slow
def test_the_commands_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--set=" + f"{key}={str(value).lower()}" for key, value in TINY.items()]
    wrong = []
    for line in commands():
        for pattern, small in SMALL.items():
            line = re.sub(pattern, small, line)
        words = shlex.split(line)[1:]
        if words[0] == "train" and "--resume" not in words:
            narrow = "best.pt" not in words and "gfl" not in line  # keys of YOLOX, and not of a file
            keys = sizes if narrow else [x for x in sizes if "width" not in x]
            words += [*keys, "--device=cpu", *([] if "--imgsz" in words else ["--imgsz=64"])]
            words += [] if "--batch" in words else ["--batch=4"]
        status, said = run(words), capsys.readouterr().err
        if "--resume" in words:  # the run of the line before has ended, and is found by this one
            good = "holds a finished run (1 epochs)" in said
        else:
            good = status == 0
        wrong += [] if good else [f"{line}\n{said}"]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
def test_the_python_lines_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(trainer.Trainer):
        """The same run at toy size."""

        def __init__(self, *args: Any, **keys: Any) -> None:
            sets = {key: value for key, value in TINY.items() if "width" not in key}
            super().__init__(*args, **keys | {"epochs": 1, "imgsz": 64, "batch": 4, "device": "cpu", "set": sets})

    monkeypatch.setattr(detector, "Trainer", Small)
    names: dict[str, Any] = {}
    for line in lines():
        if not line.startswith("yoloxkd "):
            exec(line, names)
    assert set(names) >= {"Detector", "model", "results"}
