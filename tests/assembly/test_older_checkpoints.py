"""Checkpoints of earlier versions in this version's layout."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from yoloxkd.assembly.older_checkpoints import current_layout
from yoloxkd.engine.checkpoint_parts import read_saved
from yoloxkd.errors import UserError

FILE = Path(__file__).parent.parent / "data_files" / "v0.1.0" / "last.pt.gz"
METRICS = {"AP": 0.5, "per_class": {}}


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    with gzip.open(FILE) as file:
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def with_extra(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return raw | {"run": raw["run"] | {"extra": raw["run"]["extra"] | changes, "best": 0.5}}


def test_what_callbacks_kept_in_one_place_is_theirs(raw: dict[str, Any]) -> None:
    stopping = {"best": 0.5, "epoch": 1}
    old = with_extra(
        raw,
        best_epoch=1,
        best_metrics=METRICS,
        evaluated=2,
        early_stopping=stopping,
        wandb="abc",
        backbone="fine",
        looks=3,
    )
    run = current_layout(old)["run"]
    assert "extra" not in run
    assert run["best"] == {"value": 0.5, "epoch": 1, "metrics": METRICS}
    assert run["evaluated"] == 2
    kd = raw["run"]["extra"]["kd"]
    own = {"early_stopping": stopping, "wandb": {"run": "abc"}, "backbone": {"note": "fine"}, "extra": {"looks": 3}}
    assert run["callbacks"] == own | {"kd": kd}
    assert "extra" in old["run"]  # what was given is as it was
    saved = read_saved(current_layout(old), FILE)
    assert saved.run is not None
    assert saved.run.best is not None
    assert current_layout(current_layout(old)) == current_layout(old)


def test_a_run_that_was_not_evaluated_has_no_best_epoch(raw: dict[str, Any]) -> None:
    run = current_layout(raw)["run"]
    assert (run["best"], run["evaluated"]) == (None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metrics": METRICS}, "its 'run.best.epoch' is missing"),
        ({"best_epoch": 1, "best_metrics": None}, "its 'run.best.metrics"),
        ({"kd": None}, "its 'run.callbacks.kd' should be a valid dictionary"),
        ({"early_stopping": 3}, "its 'run.callbacks.early_stopping' should be a valid dictionary"),
        ({"evaluated": "yes"}, "its 'run.evaluated'"),
    ],
)
def test_what_was_changed_is_named(changes: dict[str, Any], message: str, raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=message):
        read_saved(current_layout(with_extra(raw, **changes)), FILE)
    no_extra = raw | {"run": {key: value for key, value in raw["run"].items() if key != "extra"}}
    with pytest.raises(UserError, match=r"its 'run\.(best|evaluated|callbacks)'"):
        read_saved(current_layout(no_extra), FILE)
