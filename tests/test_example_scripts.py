"""The scripts in examples/ run, at toy size."""

from __future__ import annotations

import csv
import json
import re
import runpy
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import REPOSITORY
from yoloxkd import Detector
from yoloxkd.data import shapes
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


@pytest.fixture
def few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `shapes-easy` of a few images, which the demo's recipe and teacher are used with."""
    monkeypatch.setenv("YOLOXKD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 8, "val": 4, "test": 12})
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.usefixtures("few_images")
def test_the_demos_teacher_is_small_and_good() -> None:
    teacher = EXAMPLES / "teacher.pt"
    assert teacher.stat().st_size < 3e6
    assert Detector(teacher, "cpu").val("shapes-easy", split="test", workers=0)["AP"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1], ids=["the shown one", "the other one"])
def test_of_two_trainings_at_a_time_one_that_fails_ends_the_other(
    failing: int, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one would train for a thousand epochs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    endless = ("train", "--student", "yolox-nano", "--data", toy, "--epochs", 1000, "--imgsz", 64, "--device", "cpu")
    words: list[tuple[object, ...]] = [(*endless, "--out", tmp_path / "run")] * 2
    words[failing] = ("train", "--student", "yolox-nanno")
    with pytest.raises(SystemExit) as ended:
        import_module("demo").at_the_same_time(words[0], words[1], tmp_path / "log")
    if failing == 0:
        assert ended.value.code == 2
    else:
        assert "did you mean 'yolox-nano'?" in str(ended.value.code)
        assert "failed with status 2" in str(ended.value.code)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
def test_the_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Each step of the demo, and its teacher made anew, with an epoch of one step."""
    demo = import_module("demo")
    recipe = yaml.safe_load((EXAMPLES / "demo.yaml").read_text())
    recipe["train"] |= {"epochs": 1, "imgsz": 64}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(demo, "RECIPE", tmp_path / "toy.yaml")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["demo", f"--out={out}", "--seed=1"])
    demo.main()
    commands = re.findall(r"^\$ (?:OMP_NUM_THREADS=1 )?yoloxkd (\S+)", capfd.readouterr().out, re.MULTILINE)
    assert commands == ["train", "train", "export", "val", "explain"]
    assert [row["split"] for row in json.loads((out / "test.json").read_text())] == ["test"] * 4
    for name in (
        "side-by-side.png",
        "student.onnx",
        "explained/explain.html",
        "plain/report.html",
        "distilled/report.html",
    ):
        assert (out / name).is_file(), name
    runs = [(out / name / "results.csv").read_text().splitlines()[0] for name in ("plain", "distilled")]
    assert ["loss/response/" in columns for columns in runs] == [False, True]

    recipe["callbacks"] = {"report": False, "plots": False}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["demo_teacher", "--epochs=1", f"--out={out / 'own'}", f"--file={out / 'own.pt'}"])
    runpy.run_path(str(EXAMPLES / "demo_teacher.py"), run_name="__main__")
    full, half = (torch.load(file, weights_only=True)["model"] for file in (out / "own" / "best.pt", out / "own.pt"))
    assert {half[k].dtype for k in half if full[k].ndim == 4} == {torch.float16}
    assert all(torch.allclose(full[k].float(), half[k].float(), rtol=1e-3, atol=1e-6) for k in full)


def test_the_demo_clears_away_its_own_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    clear = import_module("demo").clear
    clear(tmp_path / "new")
    (tmp_path / "plain").mkdir()
    with pytest.raises(SystemExit, match="holds plain, which is not of an earlier demo"):
        clear(tmp_path)  # no log of a demo beside it
    (tmp_path / "plain.log").write_text("")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(SystemExit, match=r"holds mine\.txt, which is not of an earlier demo; give another --out"):
        clear(tmp_path)
    (tmp_path / "mine.txt").unlink()
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == []
