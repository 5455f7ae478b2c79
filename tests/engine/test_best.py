"""A finished run always has a best.pt, whatever its evaluations gave, and plots that fail cost nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from yoloxkd import Trainer
from yoloxkd.cli.run_tables import metrics_table
from yoloxkd.engine.callbacks import HtmlReport, Plots
from yoloxkd.engine.events import Callback, State

OPTIONS: dict[str, Any] = {"student": "yolox-nano", "batch": 24, "imgsz": 64, "device": "cpu"}
SETTINGS = TINY | {"callbacks.plots": False, "val.interval": 1, "schedule.final_epochs": 0}


class Gives(Callback):
    """Every evaluation has the next of these APs."""

    def __init__(self, aps: list[float]) -> None:
        self.aps = iter(aps)

    def on_fit_start(self, state: State) -> None:
        state.evaluate = lambda model, limit: {"AP": next(self.aps), "AP50": 0.0, "per_class": {}}


class StopsUnevaluated(Callback):
    """Ends the run after its first epoch, which has no evaluation."""

    def on_epoch_end(self, state: State) -> None:
        state.stop = True


@pytest.mark.parametrize(
    ("aps", "best"),
    [
        ([-1.0, -1.0], 2),  # nothing to measure: the last
        ([math.nan, math.nan], 2),
        ([math.nan, 0.25], 2),
        ([0.25, math.nan], 1),
        ([0.0, 0.0], 1),
        ([0.0, -1.0], 1),
    ],
)
def test_whatever_the_ap_there_is_a_best_student(aps: list[float], best: int, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit = Trainer(**OPTIONS, epochs=2, set=SETTINGS, data=str(toy), out=out, callbacks=[Gives(aps)]).fit()
    kept = torch.load(fit.best, weights_only=True)
    assert kept["epoch"] == best
    assert json.loads((out / "metrics.json").read_text())["epoch"] == best
    assert kept["metrics"]["AP"] == pytest.approx(aps[best - 1], nan_ok=True)


def test_a_run_that_was_never_evaluated_says_so_and_keeps_its_last_student(toy: Path, tmp_path: Path) -> None:
    keys, out = SETTINGS | {"val.interval": 10}, tmp_path / "run"
    fit = Trainer(**OPTIONS, epochs=20, set=keys, data=str(toy), out=out, callbacks=[StopsUnevaluated()]).fit()
    last = torch.load(out / "last.pt", weights_only=True)
    best = torch.load(fit.best, weights_only=True)
    assert (best["epoch"], best["metrics"]) == (1, {})
    assert all(torch.equal(best["model"][name], value) for name, value in last["run"]["ema"]["module"].items())
    assert "this run was not evaluated" in (out / "train.log").read_text()
    assert metrics_table(fit.metrics) == "not evaluated"


@pytest.mark.parametrize("kind", [Plots, HtmlReport])
def test_a_drawing_that_fails_is_a_warning(
    kind: type[Callback], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("no such font")

    monkeypatch.setattr("yoloxkd.viz.curves.draw_curves", broken)
    monkeypatch.setattr("yoloxkd.engine.callbacks.html_report.collect", broken)
    out = tmp_path / "run"
    keys = {k: v for k, v in SETTINGS.items() if not k.startswith("callbacks.")} | {
        "callbacks.report": kind is HtmlReport
    }
    Trainer(**OPTIONS, epochs=1, set=keys, data=str(toy), out=out).fit()
    assert (out / "metrics.json").is_file()
    assert "no such font" in (out / "train.log").read_text()
