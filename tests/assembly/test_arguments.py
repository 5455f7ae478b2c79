"""Numbers that Python users and the command line give to a model: refused before any data is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_toy
from tests.fuzz.targets import student_file
from yoloxkd.api import Detector
from yoloxkd.cli import run
from yoloxkd.errors import UserError
from yoloxkd.write_image import write_image


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.save(student_file(), tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 10**6},
        {"workers": -1},
        {"workers": True},
        {"workers": "2"},
        {"batch": 0},
        {"batch": 10**25},
        {"batch": 1.5},
    ],
)
def test_workers_and_batch_of_an_evaluation(wrong: dict[str, Any], model: Path) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} should be an integer from"):
        Detector(model, "cpu").val("no-such-data.yaml", **wrong)


@pytest.mark.parametrize("size", [0, -32, 10**25, 33, (0, 64), (64, 10**25), "64", 64.0, True])
def test_input_sizes(size: Any, model: Path) -> None:
    with pytest.raises(UserError, match="imgsz"):
        Detector(model, "cpu").size(size)
    with pytest.raises(UserError, match="imgsz"):
        Detector(model, "cpu").predict(torch.zeros(3, 64, 64, dtype=torch.uint8).numpy(), imgsz=size)


@pytest.mark.parametrize(
    "arguments",
    [("val", "--imgsz", f"{10**25}"), ("predict", "--imgsz", f"{10**25}"), ("export", "--imgsz", f"{10**25}")]
    + [("val", "--workers", "1000000"), ("val", "--batch", f"{10**25}")],
)
def test_the_command_line_too(
    arguments: tuple[str, ...], model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    command, option, number = arguments
    write_image(Path("a.png"), np.zeros((64, 64, 3), np.uint8))
    data = str(write_toy(Path("toy")))
    more = {"val": ["--data", data], "predict": ["a.png"], "export": []}[command]
    assert run([command, str(model), *more, option, number]) == 2
    said = capsys.readouterr().err.strip()
    assert option.strip("-") in said
    assert "\n" not in said
