"""The scripts in examples/ run, at toy size."""

from __future__ import annotations

import csv
import runpy
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from yoloxkd.kd import DISTILLERS

EXAMPLES = REPOSITORY / "examples"


@pytest.mark.slow
def test_the_scripts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rectangles = import_module("rectangles")
    monkeypatch.setattr(rectangles, "write_data", partial(rectangles.write_data, images=8))
    for key, value in {"callbacks.report": False, "callbacks.plots": False}.items():
        monkeypatch.setitem(rectangles.SHORT, key, value)
    for name in ("own_data", "two_teachers", "cross_family", "own_method"):
        monkeypatch.setattr(sys, "argv", [name, "--epochs=1", f"--out={tmp_path / name}"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    del DISTILLERS["l2"]  # of own_method.py
    assert (tmp_path / "own_data" / "drawn.png").is_file()
    for name, terms in (("two_teachers", ["pgd@1", "pgd@2"]), ("cross_family", ["pkd"]), ("own_method", ["l2"])):
        with open(tmp_path / name / "student" / "results.csv", newline="") as file:
            columns = list(next(csv.DictReader(file)))
        assert all(any(f"loss/{term}/" in column for column in columns) for term in terms), columns
