"""The examples in the docstrings of the public interface run."""

from __future__ import annotations

import doctest
import gzip
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import yoloxkd
from tests.conftest import REPOSITORY, TINY, write_toy
from yoloxkd.api import detector, trainer

OLDER = Path(__file__).parent / "data_files" / "v0.1.0"
QUICK = ("Detections", "UserError")
"""Objects whose examples show their output; it is compared."""


def examples(item: object, name: str) -> list[doctest.Example]:
    found = doctest.DocTestFinder().find(item, name, globs={})
    return [example for each in found for example in each.examples]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples name: best.pt, teacher.pt, my.yaml, photo.jpg, other.jpg and export/predict.py in the working folder."""
    for name in ("best.pt", "teacher.pt"):
        (tmp_path / name).write_bytes(gzip.decompress((OLDER / "best.pt.gz").read_bytes()))
    write_toy(tmp_path / "toy").rename(tmp_path / "toy" / "data.yaml")
    text = (tmp_path / "toy" / "data.yaml").read_text()
    (tmp_path / "my.yaml").write_text(text.replace("path: .", f"path: {tmp_path / 'toy'}"))
    for name in ("photo.jpg", "other.jpg"):
        cv2.imwrite(str(tmp_path / name), np.full((48, 64, 3), 90, np.uint8))
    (tmp_path / "export").mkdir()
    shutil.copy(REPOSITORY / "export" / "predict.py", tmp_path / "export")
    # `python` in an example is the one that runs the tests
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(item: object, name: str, names: dict[str, Any]) -> int:
    """Execute the examples of an object and of its methods, in order; how many there were."""
    blocks = examples(item, name)
    for example in blocks:
        exec(compile(example.source, f"<example of {name}>", "single"), names)
    return len(blocks)


@pytest.mark.parametrize("name", QUICK)
def test_examples_give_what_they_show(name: str) -> None:
    item = getattr(yoloxkd, name)
    test = doctest.DocTestFinder().find(item, name, globs={"np": np, name: item})
    assert sum(len(each.examples) for each in test) > 0
    runner = doctest.DocTestRunner()
    assert all(runner.run(each).failed == 0 for each in test)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Detector", "Trainer"])
def test_examples_of_the_interface_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(trainer.Trainer):
        """The same run with a tiny student."""

        def __init__(self, *args: Any, **keys: Any) -> None:
            sets = {
                key: value
                for key, value in TINY.items()
                if not str(keys["student"]).endswith(".pt") or "width" not in key
            }
            super().__init__(*args, **keys | {"imgsz": 64, "batch": 4, "device": "cpu", "set": sets})

    monkeypatch.setattr(detector, "Trainer", Small)
    kind = {"Detector": detector.Detector, "Trainer": trainer.Trainer}[name]
    names = {"Detector": detector.Detector, "Trainer": Small, "np": np}
    assert run(kind, name, names) >= 2


def test_every_public_class_has_an_example() -> None:
    lacking = []
    for name in yoloxkd.__all__:
        item = getattr(importlib.import_module("yoloxkd"), name)
        if isinstance(item, type) and name not in ("Detection", "EvalResult", "FitResult", "Callback"):
            lacking += [name] if not examples(item, name) else []
    assert lacking == []
