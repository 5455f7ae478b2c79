"""The commands one after another in an empty folder, as the README shows them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import pytest

from tests.conftest import TINY
from yoloxkd.cli import run
from yoloxkd.metrics.coco import ERROR_MEANING

FAST = [f"--set={key}={value}" for key, value in TINY.items()]


@pytest.fixture
def folder(tmp_path: Path, toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with one finished run in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_run, tmp_path / "runs" / "yolox-nano")
    return tmp_path


def ok(arguments: list[object]) -> None:
    assert run([str(a) for a in arguments]) == 0


@pytest.mark.slow
def test_train_val_predict_export_without_naming_a_model(
    folder: Path, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--epochs", 1, "--batch", 4, "--imgsz", 64, "--device", "cpu", "--workers", 0]
    teacher = folder / "runs" / "yolox-nano" / "best.pt"
    # the student goes on from the trained one, so that one more epoch leaves something to detect
    ok(["train", "--student", teacher, "--teacher", teacher, "--kd", "pgd", "--data", toy, *quick, *FAST])
    newest = folder / "runs" / "yolox-nano-pgd"
    assert (newest / "metrics.json").is_file()
    capsys.readouterr()

    ok(["val", "--data", toy, "--json", "val.json", "--out", "val", "--workers", 0])
    shown = capsys.readouterr().out
    saved = json.loads(Path("val.json").read_text())
    assert "yolox-nano-pgd" in saved["model"]
    assert saved["data"] == "data.yaml"  # the folders of this machine are nobody else's matter
    assert f"{saved['AP']:.4f}" in shown
    assert isinstance(json.loads(Path("val/detections.json").read_text()), list)

    ok(["predict", toy.parent / "images" / "val", "--conf", 0.001, "--out", "drawn", "--json", "found.json"])
    rows = json.loads(Path("found.json").read_text())
    assert len(rows) == 5
    assert {"box", "score", "label", "name"} == set(rows[0]["detections"][0])
    assert cv2.imread("drawn/0.png").shape == (96, 96, 3)

    ok(["export", "--format", "onnx", "--output", "student.onnx"])
    assert "parity" in capsys.readouterr().out
    assert json.loads(Path("student.parity.json").read_text())["passed"] is True
    capsys.readouterr()
    ok(["val", "student.onnx", newest / "best.pt", "--errors", "--data", toy, "--workers", 0, "--json", "both.json"])
    exported, trained = json.loads(Path("both.json").read_text())
    assert exported["AP"] == pytest.approx(saved["AP"], abs=1e-6) == trained["AP"]
    assert list(exported["errors"]) == list(ERROR_MEANING)
    shown = capsys.readouterr().out.splitlines()
    errors = shown[next(i for i, line in enumerate(shown) if line.startswith("errors")) + 1]
    assert [f"({one['count']})" for one in exported["errors"].values()] == errors.split()[2::2]
    assert run(["val", "student.onnx", str(newest / "best.pt"), "--data", str(toy), "--out", "both"]) == 2
    assert "--out is the folder of one model's" in capsys.readouterr().err
    ok(["predict", "student.onnx", toy.parent / "images" / "val" / "0.png", "--out", "drawn2"])


def test_pycocotools_gives_the_same_numbers(folder: Path, toy: Path) -> None:
    for backend in ("hotcoco", "pycocotools"):
        ok(["val", "--data", toy, "--workers", 0, "--set", f"val.backend={backend}", "--json", f"{backend}.json"])
    assert json.loads(Path("hotcoco.json").read_text()) == json.loads(Path("pycocotools.json").read_text())


def test_show_and_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ok(["show", "yolox-m"])
    shown = capsys.readouterr().out
    for part in ("25.33 M", "73.75 G", "strides     8, 16, 32", "mosaic: 1.0", "imgsz: 640"):
        assert part in shown
    ok(["show", "runs/yolox-nano/best.pt"])
    shown = capsys.readouterr().out
    assert "red, blue" in shown
    assert "taps" in shown
    ok(["show", "runs/yolox-nano/recipe.yaml"])
    assert "width: 0.125" in capsys.readouterr().out
    ok(["show", "mask-rcnn-mobilenetv2"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert lines["proposals"].startswith("3 anchors a cell at strides 4, 8, 16, 32, 64; the best 1000 of a level")
    assert lines["roi"].startswith("7 x 7 cells of a region -> its class, and a box of every class; 14.31 M parameters")
    assert lines["roi/mask"].startswith("14 x 14 cells of a region -> 28 x 28 of a mask of every class; 2.64 M")
    ok(["models"])
    assert "yolox-nano@coco" in capsys.readouterr().out


def test_val_takes_a_run_that_was_interrupted(folder: Path, toy: Path) -> None:
    ok(["val", "runs/yolox-nano/last.pt", "--data", toy, "--workers", 0])


@pytest.mark.slow
def test_a_raw_export_of_any_size(folder: Path, toy: Path) -> None:
    ok(["export", "--format", "onnx", "--no-nms", "--dynamic", "--output", "raw.onnx", "--verify", toy])
    ok(["val", "raw.onnx", "--data", toy, "--workers", 0])
    ok(["val", "raw.onnx", "--data", toy, "--workers", 0, "--imgsz", 96])
