"""Whole runs on toy data: what is written, that the same seed gives the same run, and that resuming changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import REPOSITORY, TINY
from tests.engine.runs import StopAt, rows, same
from yoloxkd import Detector, Trainer
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.loop import _signals
from yoloxkd.errors import GateError, Interrupted
from yoloxkd.metrics.coco import ERROR_MEANING, METRIC_NAMES

pytestmark = pytest.mark.slow

EPOCHS = 3
OPTIONS = {"student": "yolox-nano", "epochs": EPOCHS, "batch": 4, "imgsz": 64, "device": "cpu", "set": TINY}


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["model"]


@pytest.fixture(scope="module")
def distilled(toy: Path, toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted distillation, by a teacher of another width so that FGD and PGD need adapters."""
    out = tmp_path_factory.mktemp("whole") / "run"
    teacher = str(toy_run / "best.pt")
    settings = TINY | {"student.width": 0.25}
    Trainer(**OPTIONS | {"set": settings}, data=str(toy), teacher=teacher, kd=["pgd", "fgd"], out=out).fit()
    return out


def test_the_folder_holds_what_is_promised(toy_run: Path) -> None:
    present = {p.name for p in toy_run.iterdir()}
    assert {"recipe.yaml", "results.csv", "metrics.json", "best.pt", "last.pt", "train.log", "plots"} <= present
    assert not [name for name in present if name.endswith(".part")]
    metrics = json.loads((toy_run / "metrics.json").read_text())
    assert set(METRIC_NAMES) <= set(metrics)
    assert set(metrics["per_class"]) == {"red", "blue"}
    assert list(metrics["errors"]) == list(ERROR_MEANING)
    recipe = yaml.safe_load((toy_run / "recipe.yaml").read_text())
    assert recipe["student"]["name"] == "yolox-nano"
    assert recipe["student"]["width"] == 0.125
    table = rows(toy_run)
    assert [row["epoch"] for row in table] == [str(i) for i in range(1, 26)]
    assert {"loss/box", "loss/obj", "loss/cls", "lr", "AP"} <= set(table[0])
    assert table[0]["loss/l1"] == "" != table[-1]["loss/l1"]  # only in the final epochs
    assert (toy_run / "plots" / "curves.png").stat().st_size > 1000
    assert (toy_run / "plots" / "predictions.png").stat().st_size > 1000
    assert metrics["AP50"] > 0.2  # it has learnt something, so the tests that use it compare detections


def test_every_distillation_term_is_logged_per_level_and_not_zero(distilled: Path) -> None:
    terms = [name for name in rows(distilled)[0] if name.startswith(("loss/pgd", "loss/fgd"))]
    for stride in (8, 16, 32):
        for term in ("fgd/fg", "fgd/bg", "fgd/attention", "fgd/global", "pgd/cls_fg", "pgd/reg_fea"):
            assert f"loss/{term}/s{stride}" in terms
    totals = {name: sum(float(row[name]) for row in rows(distilled)) for name in terms}
    assert all(totals[f"loss/fgd/{t}/s8"] > 0 for t in ("fg", "bg", "attention"))
    assert sum(v for name, v in totals.items() if "pgd" in name) > 0


def test_best_is_the_student_alone(distilled: Path, toy: Path) -> None:
    raw = torch.load(distilled / "best.pt", weights_only=True)
    assert raw["kind"] == "student"
    assert all(name.startswith(("backbone.", "head.")) for name in raw["model"])
    metrics = Detector(distilled / "best.pt", "cpu").val(str(toy), workers=0)
    saved = json.loads((distilled / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(saved["AP"], abs=1e-9)


def test_last_of_a_distillation_exports_its_averaged_student(distilled: Path, toy: Path, tmp_path: Path) -> None:
    raw = torch.load(distilled / "last.pt", weights_only=True)
    student = Detector(distilled / "last.pt", "cpu")
    assert same(student.network.state_dict(), raw["run"]["ema"]["module"])
    assert not same(raw["model"], raw["run"]["ema"]["module"])
    path = student.export(tmp_path / "last.onnx", verify=str(toy), say=None)
    assert Detector(path).val(str(toy), workers=0)["AP"] == pytest.approx(
        student.val(str(toy), workers=0)["AP"], abs=1e-4
    )


def test_the_same_seed_gives_the_same_run(distilled: Path, toy: Path, toy_run: Path, tmp_path: Path) -> None:
    settings = TINY | {"student.width": 0.25, "engine.workers": 2}
    teacher = str(toy_run / "best.pt")
    again = Trainer(
        **OPTIONS | {"set": settings}, data=str(toy), teacher=teacher, kd=["pgd", "fgd"], out=tmp_path / "r"
    ).fit()
    assert same(weights(again.out / "last.pt"), weights(distilled / "last.pt"))
    assert rows(again.out) == rows(distilled)


@pytest.mark.parametrize(
    "iteration", [1, 12, 14]
)  # in the first epoch, after the last step of the second, in the third
def test_resuming_changes_nothing(iteration: int, distilled: Path, toy: Path, toy_run: Path, tmp_path: Path) -> None:
    settings = TINY | {"student.width": 0.25}
    teacher = str(toy_run / "best.pt")
    out = tmp_path / "run"
    trainer = Trainer(
        **OPTIONS | {"set": settings},
        data=str(toy),
        teacher=teacher,
        kd=["pgd", "fgd"],
        out=out,
        callbacks=[StopAt(iteration)],
    )
    with pytest.raises(Interrupted, match="--resume"):
        trainer.fit()
    assert not (out / "metrics.json").exists()
    fit = Trainer(resume=out).fit()
    assert same(weights(out / "last.pt"), weights(distilled / "last.pt"))
    assert same(weights(fit.best), weights(distilled / "best.pt"))
    assert rows(out) == rows(distilled)


def test_a_changed_teacher_is_refused_on_resume(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes((toy_run / "best.pt").read_bytes())
    trainer = Trainer(
        **OPTIONS, data=str(toy), teacher=str(teacher), kd="pgd", out=tmp_path / "run", callbacks=[StopAt(1)]
    )
    with pytest.raises(Interrupted):
        trainer.fit()
    raw = torch.load(teacher, weights_only=True)
    raw["model"] = {k: v * 1.5 if v.is_floating_point() else v for k, v in raw["model"].items()}
    torch.save(raw, teacher)
    with pytest.raises(Exception, match="teacher"):
        Trainer(resume=tmp_path / "run").fit()


class Poison(Callback):
    """Makes a weight NaN."""

    def on_step(self, state: State) -> None:
        if state.iteration == 8:  # in the second epoch, when the first has written last.pt
            with torch.no_grad():
                next(state.detector.parameters()).fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_the_run(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="not finite"):
        Trainer(**OPTIONS, data=str(toy), out=tmp_path / "run", callbacks=[Poison()]).fit()
    kept = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert all(v.isfinite().all() for v in kept["model"].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_writes_last_and_exits_130(number: signal.Signals, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "yoloxkd",
        "train",
        "--student",
        "yolox-nano",
        "--data",
        str(toy),
        "--epochs",
        "500",
    ]
    command += ["--batch", "2", "--imgsz", "64", "--device", "cpu", "--out", str(out), "--workers", "0"]
    command += ["--set", "student.width=0.125", "--set", "augment.multiscale=0"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not (out / "last.pt").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    for _ in range(2 if number == signal.SIGHUP else 1):  # the terminal and the shell each send one
        os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith(f"yoloxkd: stopped by {number.name}")
    assert torch.load(out / "last.pt", weights_only=True)["kind"] == "run"


def test_a_lost_terminal_that_is_ignored_stays_so() -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _signals(lambda number: None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with _signals(lambda number: None):
            assert callable(signal.getsignal(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
