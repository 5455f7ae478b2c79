"""A run that was stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from tests.engine.runs import rows, same
from yoloxkd import Trainer
from yoloxkd.engine.callbacks.csv_log import read_rows
from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import Interrupted, UserError

STEPS = 3  # batches of 8 in the toy's 24 images
SETTINGS = TINY | {
    "augment.multiscale": 1,
    "val.interval": 1,
    "callbacks.early_stopping.patience": 50,
    "callbacks.plots": False,
}
OPTIONS: dict[str, Any] = {"student": "yolox-nano", "epochs": 4, "batch": 8, "imgsz": 64, "device": "cpu", "seed": 2}


class Draws(Callback):
    """Uses every random generator in each step and remembers what came, with the size of the batch."""

    def __init__(self) -> None:
        self.drawn: list[list[float]] = []

    def on_step(self, state: State) -> None:
        assert state.batch is not None
        drawn = [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]
        self.drawn.append([*drawn, state.batch.images.shape[-1]])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.drawn = list(saved["drawn"])


class Stop(Callback):
    """Sends the process a signal at an event of an iteration."""

    def __init__(self, event: str, iteration: int, number: int) -> None:
        self.iteration, self.number = iteration, number
        setattr(self, event, self._send)

    def _send(self, state: State) -> None:
        if state.iteration == self.iteration:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def whole(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    Trainer(**OPTIONS, set=SETTINGS, data=str(toy), out=out, callbacks=[Draws()]).fit()
    return out


def equal_runs(a: Path, b: Path) -> None:
    """Everything two runs leave but times: all of last.pt, best.pt, results.csv without the speed, the other tables."""
    ours, theirs = (torch.load(out / "last.pt", weights_only=True) for out in (a, b))
    assert same(ours["model"], theirs["model"])
    for key in theirs["run"]:
        assert same(ours["run"][key], theirs["run"][key]), key
    assert rows(a) == rows(b)
    for name in ("metrics.json", "learning_rate.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    best, other = (torch.load(out / "best.pt", weights_only=True) for out in (a, b))
    assert all(same(best[key], other[key]) for key in ("model", "epoch", "metrics"))


@pytest.mark.parametrize(
    ("event", "iteration", "number", "workers"),
    [
        pytest.param("on_step", 1, signal.SIGINT, 2, marks=pytest.mark.slow),  # in the first epoch
        ("on_step", STEPS, signal.SIGTERM, 0),  # after the last step of the first, before its evaluation
        pytest.param("on_eval_end", 2 * STEPS, signal.SIGTERM, 1, marks=pytest.mark.slow),  # after the second
        pytest.param("on_step", 3 * STEPS + 2, signal.SIGINT, 0, marks=pytest.mark.slow),  # in the last
    ],
)
def test_stopped_and_resumed_is_the_same_run(
    event: str, iteration: int, number: int, workers: int, whole: Path, toy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = SETTINGS | {"engine.workers": workers}
    callbacks = [Draws(), Stop(event, iteration, number)]
    with pytest.raises(Interrupted) as caught:
        Trainer(**OPTIONS, set=settings, data=str(toy), out=out, callbacks=callbacks).fit()
    assert caught.value.exit_code == 130
    random.seed(99)  # nothing of this process's own state may matter
    np.random.seed(99)
    torch.manual_seed(99)
    Trainer(resume=out, callbacks=[Draws()]).fit()
    equal_runs(out, whole)
    sizes = {draw[-1] for draw in torch.load(out / "last.pt", weights_only=True)["run"]["callbacks"]["Draws"]["drawn"]}
    assert len(sizes) > 1  # multi-scale was on


def _train(options: dict[str, Any]) -> None:
    """In a process of its own: start the run, or continue it where its folder has a checkpoint."""
    out = options["out"]
    if (out / "last.pt").is_file():
        Trainer(resume=out, callbacks=[Draws()]).fit()
    else:
        Trainer(**options, callbacks=[Draws()]).fit()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_from_a_good_file(whole: Path, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = OPTIONS | {"set": SETTINGS, "data": str(toy), "out": out}
    chance = random.Random(0)
    context = multiprocessing.get_context("forkserver")  # children without this process's threads
    context.set_forkserver_preload([__name__])
    kills = 0
    while kills < 3:
        process = context.Process(target=_train, args=(options,))
        before = (out / "results.csv").stat().st_mtime_ns if (out / "results.csv").is_file() else 0
        process.start()
        while process.is_alive():  # let it do an epoch, so that the run comes to an end
            if (out / "results.csv").is_file() and (out / "results.csv").stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        kills += 1
        if (out / "last.pt").exists():
            assert torch.load(out / "last.pt", weights_only=True)["kind"] == "run"  # it can be read
    assert kills
    _train(options)
    assert not list(out.rglob(".*.part"))
    equal_runs(out, whole)


class FailsOnce(Callback):
    """Makes the evaluation of an epoch fail, as a broken image or the metric's backend would."""

    def __init__(self, epoch: int, error: BaseException) -> None:
        self.epoch, self.error = epoch, error

    def on_fit_start(self, state: State) -> None:
        evaluate = state.evaluate

        def failing(model: Any, limit: int | None) -> dict[str, Any]:
            if state.epoch == self.epoch:
                raise self.error
            return evaluate(model, limit)

        state.evaluate = failing


class Panic(BaseException):
    """A panic of Rust code comes as a BaseException that is no Exception."""


@pytest.mark.parametrize(
    ("epoch", "error"),
    [(0, UserError("an image is cut short")), pytest.param(3, Panic("index 7"), marks=pytest.mark.slow)],
)
def test_an_evaluation_that_fails_costs_no_epoch(
    epoch: int, error: BaseException, whole: Path, toy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(type(error)):
        Trainer(**OPTIONS, set=SETTINGS, data=str(toy), out=out, callbacks=[Draws(), FailsOnce(epoch, error)]).fit()
    kept = torch.load(out / "last.pt", weights_only=True)["run"]
    assert (kept["epoch"], kept["step_in_epoch"], kept["iteration"]) == (epoch, STEPS, (epoch + 1) * STEPS)
    log = (out / "train.log").read_text()
    assert f"ended by {type(error).__name__}: {error}" in log
    assert f"--resume {out}" in log
    random.seed(99)
    Trainer(resume=out, callbacks=[Draws()]).fit()
    equal_runs(out, whole)
    assert all(float(row["images_per_s"]) > 0 for row in read_rows(out / "results.csv"))
