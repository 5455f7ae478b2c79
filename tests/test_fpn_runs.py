"""FPN detectors through the whole package: train, teach, resume, evaluate, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.nn.fpn import BACKBONE
from yoloxkd import Detector, Trainer
from yoloxkd.assembly.models import read_weights
from yoloxkd.assembly.recipes import resolve
from yoloxkd.cli.run_tables import describe
from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import UserError

pytestmark = pytest.mark.slow

TINY = {
    "student.backbone": BACKBONE,
    "student.channels": 16,
    "student.groups": 4,
    "student.stacked_convs": 1,
    "augment.multiscale": 0,
    "augment.mosaic": 0.5,
    "engine.workers": 0,
    "teacher.min_ap": 0,
    "callbacks.report": False,
    "callbacks.plots": False,
}


@pytest.fixture(scope="module")
def teacher(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pt of a narrow FCOS trained for an epoch, from an untrained backbone, on the toy data."""
    out = tmp_path_factory.mktemp("fpn") / "teacher"
    said: list[str] = []

    class Hear(Callback):
        def on_fit_end(self, state: State) -> None:
            said.append((out / "train.log").read_text())

    Trainer(
        student="fcos-mobilenetv2",
        data=str(toy),
        epochs=1,
        batch=4,
        imgsz=96,
        device="cpu",
        set=TINY,
        out=out,
        callbacks=[Hear()],
    ).fit()
    assert "starts UNTRAINED" in said[0]
    lines = (out / "train.log").read_text().splitlines()
    assert sum("starts UNTRAINED" in line for line in lines) == 2
    assert "starts UNTRAINED" in lines[-1]  # once more beside the result
    assert "starts UNTRAINED" in json.loads((out / "environment.json").read_text())["backbone"]
    return out / "best.pt"


def test_a_checkpoint_says_that_nothing_was_frozen(teacher: Path) -> None:
    section = read_weights(str(teacher)).section
    assert (section["name"], section["frozen_stages"], section["norm_eval"]) == ("fcos-mobilenetv2", 0, False)
    assert section["backbone"] == BACKBONE


@pytest.mark.parametrize(("student", "method"), [("gfl-mobilenetv2", "fgd"), ("atss-mobilenetv2", "pgd")])
def test_it_teaches_another_family(teacher: Path, toy: Path, tmp_path: Path, student: str, method: str) -> None:
    fit = Trainer(
        student=student, teacher=str(teacher), kd=method, data=str(toy), epochs=1, batch=4, imgsz=96, device="cpu",
        set=TINY, out=tmp_path / "run",
    ).fit()  # fmt: skip
    header = (tmp_path / "run" / "results.csv").read_text().splitlines()[0]
    assert all(f"{method}/" in name for name in header.split(",") if "/s" in name)
    assert {f"/s{stride}" for stride in (8, 16, 32, 64, 128)} <= {
        "/" + n.rpartition("/")[2] for n in header.split(",") if "/s" in n
    }
    assert fit.best.is_file()


def test_a_student_can_start_from_its_checkpoint(teacher: Path, toy: Path, tmp_path: Path) -> None:
    Trainer(student=str(teacher), data=str(toy), epochs=1, batch=4, imgsz=96, device="cpu", out=tmp_path / "run",
            set={k: v for k, v in TINY.items() if not k.startswith("student.")}).fit()  # fmt: skip
    assert "(100.0%)" in (tmp_path / "run" / "train.log").read_text()


def test_a_resumed_run_trains_what_was_trained(toy: Path, tmp_path: Path) -> None:
    """The stop comes after the backbone's freezing was lifted: the resumed run must lift it too, and end the same."""

    class Stop(Callback):
        def on_epoch_start(self, state: State) -> None:
            if state.epoch == 1:
                shutil.copytree(state.out, tmp_path / "cut", dirs_exist_ok=True)

    keys = {"student": "fcos-r50", "data": str(toy), "epochs": 2, "batch": 4, "imgsz": 64, "device": "cpu"}
    whole = Trainer(**keys, set=TINY, out=tmp_path / "whole", callbacks=[Stop()]).fit()  # type: ignore[arg-type]
    assert not (tmp_path / "cut" / "metrics.json").exists()
    again = Trainer(resume=tmp_path / "cut").fit()
    assert again.metrics == whole.metrics
    a, b = read_weights(str(whole.best)).state, read_weights(str(again.best)).state
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_val_and_export(teacher: Path, toy: Path, tmp_path: Path) -> None:
    detector = Detector(teacher)
    assert detector.stride == 32
    metrics = detector.val(str(toy), split="test", workers=0)
    assert 0 <= metrics["AP"] <= 1
    path = detector.export(tmp_path / "x.onnx", verify=str(toy))
    assert Detector(path).stride == 32
    assert len(Detector(path).val(str(toy), split="test", workers=0)) == len(metrics)


def test_two_sides(toy: Path, tmp_path: Path) -> None:
    """A size of two sides through training, distillation, checkpoint, evaluation, prediction and the refusal to export."""
    keys = TINY | {"train.imgsz": [64, 96], "augment.mosaic": 0, "augment.short_sides": [48, 80]}
    run = {"data": str(toy), "epochs": 1, "batch": 4, "device": "cpu"}
    shapes: list[tuple[int, ...]] = []

    class See(Callback):
        def on_step(self, state: State) -> None:
            assert state.batch is not None
            assert state.batch.targets.content is not None
            shapes.append(tuple(state.batch.images.shape[2:]))

    first = Trainer(student="gfl-mobilenetv2", set=keys, out=tmp_path / "a", callbacks=[See()], **run).fit()  # type: ignore[arg-type]
    assert len(shapes) == 6
    assert {side % 32 for shape in shapes for side in shape} == {0}
    fit = Trainer(
        student="atss-mobilenetv2", teacher=str(first.best), kd="fgd", set=keys | {"callbacks.plots": True}, out=tmp_path / "b",
        **run,  # type: ignore[arg-type]
    ).fit()  # fmt: skip
    assert (tmp_path / "b" / "plots" / "predictions.png").is_file()
    detector = Detector(fit.best, "cpu")
    assert detector.imgsz == (64, 96)
    metrics = detector.val(str(toy), workers=0)
    assert metrics["AP"] == pytest.approx(fit.metrics["AP"], abs=1e-9)
    assert len(detector.predict(toy.parent / "images" / "val" / "0.png", conf=0.0)[0].boxes)
    assert "64x96 px" in describe(str(fit.best))
    with pytest.raises(UserError, match=r"short side of 64 and a long side of 96 px.*--imgsz N, such as 64"):
        detector.export(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "keeps the aspect ratio.*augment.mosaic=0 and augment.multiscale=0"),
        ({"augment.mosaic": 0}, "keeps the aspect ratio"),
        ({"train.imgsz": 640, "augment.short_sides": [480, 800]}, "short_sides draws.*train.imgsz is one number"),
        ({"train.imgsz": [1333, 800]}, "'train.imgsz'.*the short one first"),
        ({"train.imgsz": [0, 800]}, "'train.imgsz'.*a side of 32 to 16384 px"),
        ({"augment.short_sides": [800, 480]}, "'augment.short_sides'.*lowest first"),
        ({"augment.mosaic": 0, "augment.multiscale": 0, "augment.short_sides": [480, 1400]}, "above the long side"),
    ],
)
def test_sizes_that_cannot_be(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(student="yolox-nano", sets={"train.imgsz": [800, 1333]} | keys)
