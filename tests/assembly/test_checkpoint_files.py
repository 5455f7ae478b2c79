"""A command opens each checkpoint once, whoever reads it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import TINY, write_toy
from tests.engine.runs import StopAt
from tests.study.conftest import definition, write
from yoloxkd import Trainer
from yoloxkd.assembly.models import CheckpointFiles, build_detector
from yoloxkd.cli import run
from yoloxkd.cli.run_tables import describe
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.errors import Interrupted
from yoloxkd.study.definition import read_study
from yoloxkd.study.plan import plan

SETS = TINY | {"callbacks.plots": False, "augment.mosaic": 0.0, "optim.lr_per_image": 1e-9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a student's and a teacher's file, and an image."""
    folder = tmp_path_factory.mktemp("files")
    write_toy(folder / "toy", images=4, size=64)
    for number, name in enumerate(("student", "teacher")):
        torch.manual_seed(number)
        section = {"name": "yolox-nano", "width": 0.0625}
        model = build_detector(section, ["red", "blue"])
        header = {"kind": "student", "student": section, "names": model.names, "imgsz": 64}
        save_checkpoint(header | {"model": model.state_dict()}, folder / f"{name}.pt")
    cv2.imwrite(str(folder / "image.png"), np.full((64, 64, 3), 110, np.uint8))
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """{name of a file: how often it was opened}"""
    counts: Counter[str] = Counter()
    load = torch.load

    def counted(file: Any, *args: Any, **kwargs: Any) -> Any:
        counts[Path(file).name] += 1
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", counted)
    return counts


@pytest.mark.slow
def test_training_and_resuming(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    out = tmp_path / "run"
    student, teacher = str(folder / "student.pt"), str(folder / "teacher.pt")
    trainer = Trainer(
        student, teacher, "pgd", str(folder / "toy" / "data.yaml"), epochs=1, batch="auto", imgsz=64, device="cpu", out=out,
        set=SETS | {"student.width": 0.0625}, callbacks=[StopAt(1)],
    )  # fmt: skip
    with pytest.raises(Interrupted):
        trainer.fit()
    assert opened == {"student.pt": 1, "teacher.pt": 1}
    opened.clear()
    assert run(["train", "--resume", str(out)]) == 0
    assert opened == {"last.pt": 1, "teacher.pt": 1}


def test_a_student_that_is_its_own_teacher(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    file = str(folder / "student.pt")
    command = ["train", "--student", file, "--teacher", file, "--data", str(folder / "toy" / "data.yaml")]
    command += ["--epochs", "1", "--batch", "2", "--imgsz", "64", "--device", "cpu", "--out", str(tmp_path / "run")]
    for key, value in SETS.items():
        command += ["--set", f"{key}={value}"]
    assert run([*command, "--set", "student.width=0.0625"]) == 0
    assert opened == {"student.pt": 1}


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "student.pt", "image.png", "--out", "OUT"],
        ["val", "student.pt", "--data", "toy/data.yaml", "--workers", "0"],
        pytest.param(
            ["export", "student.pt", "--output", "OUT/x.onnx", "--verify", "toy/data.yaml"], marks=pytest.mark.slow
        ),
        ["show", "student.pt"],
    ],
    ids=lambda command: command[0],
)
def test_using_a_model(
    command: list[str], folder: Path, tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert run([word.replace("OUT", str(tmp_path)) for word in command]) == 0
    assert opened == {"student.pt": 1}


def test_planning_a_study(folder: Path, tmp_path: Path, opened: Counter[str]) -> None:
    value = definition("shapes", folder / "teacher.pt", students={"nano": str(folder / "student.pt")}, seeds=[0, 1])
    plan(read_study(write(tmp_path, value)), tmp_path)
    assert opened == {"student.pt": 1}


def test_names_of_one_reader_are_not_those_of_another(folder: Path) -> None:
    """A teacher may be given other names than its file has; the student that starts from the file keeps the file's."""
    files = CheckpointFiles()
    files.read(str(folder / "student.pt")).names[:] = ["x", "y"]
    assert files.read(str(folder / "student.pt")).names == ["red", "blue"]
    assert "2: red, blue" in describe(str(folder / "student.pt"))


def test_a_file_that_is_published_under_a_name_has_the_names_of_coco(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yoloxkd.assembly import models

    file = tmp_path / "x.pth"
    torch.save({"model": build_detector({"name": "yolox-nano"}, ["x"] * 80).state_dict()}, file)
    monkeypatch.setattr(models, "fetch", lambda published: file)
    files = CheckpointFiles()
    assert files.read("yolox-nano@coco").named
    assert not files.read(str(file)).named
