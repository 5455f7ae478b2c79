"""A last.pt that was changed is refused before the run goes on, in one sentence."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import write_toy
from yoloxkd.api import Trainer
from yoloxkd.assembly.run import prepare, read_resume
from yoloxkd.errors import UserError

NAN = float("nan")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A last.pt after one epoch of two."""
    folder = tmp_path_factory.mktemp("run")
    data = write_toy(folder / "data", images=4, size=64)
    sets = {"student.width": 0.0625, "augment.multiscale": 0, "augment.mosaic": 0, "callbacks.plots": False}
    options: dict[str, Any] = {"data": str(data), "epochs": 1, "batch": 2, "imgsz": 64, "device": "cpu", "workers": 0}
    Trainer("yolox-nano", **options, set=sets, out=folder / "run", console=Console(file=io.StringIO())).fit()
    found: dict[str, Any] = torch.load(folder / "run" / "last.pt", weights_only=True)
    found["recipe"]["train"]["epochs"] = 2
    return found


def first_momentum(run: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = run["optimizer"]["state"][0]
    return entry


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "negative epoch": (lambda r: r.update(epoch=-1), "'run.epoch'"),
    "epoch beyond the end": (lambda r: r.update(epoch=7), "7 of its 2 epochs"),
    "epoch as text": (lambda r: r.update(epoch="1"), "'run.epoch'"),
    "step beyond the epoch": (lambda r: r.update(step_in_epoch=99), "99 steps"),
    "huge iteration": (lambda r: r.update(iteration=10**25), "'run.iteration'"),
    "no random state": (lambda r: r.pop("rng"), "'run.rng' is missing"),
    "half a random state": (lambda r: r["rng"].update(torch=torch.zeros(3, dtype=torch.uint8)), "random state"),
    "another random state": (lambda r: r["rng"].update(python=[3, [1, 2], None]), "random state"),
    "momentum of another shape": (lambda r: first_momentum(r).update(momentum_buffer=torch.zeros(3, 7)), "momentum"),
    "momentum not finite": (lambda r: first_momentum(r)["momentum_buffer"].fill_(NAN), "not finite"),
    "momentum of more parameters": (
        lambda r: r["optimizer"]["state"].update({9999: {"momentum_buffer": torch.zeros(1)}}),
        "10000 parameters",
    ),
    "no optimizer": (lambda r: r.update(optimizer=None), "optimizer state: there is none"),
    "no averages": (lambda r: r.update(ema=None), "averaged weights: there are none"),
    "averages without a layer": (lambda r: r["ema"]["module"].popitem(), "averaged weights.*missing in it"),
    "a best AP that is none": (lambda r: r.update(best=NAN), "'run.best'"),
    "metrics as text": (lambda r: r["metrics"].update(AP="good"), "'run.metrics"),
    "early stopping as a number": (lambda r: r["extra"].update(early_stopping=3), "'run.extra.early_stopping'"),
}


def resume(raw: dict[str, Any], folder: Path) -> None:
    torch.save(raw, folder / "last.pt")
    recipe, out, found = read_resume(str(folder / "last.pt"))
    prepare(recipe, out, resume=found, console=Console(file=io.StringIO()))._setup()


def test_what_was_saved_can_be_resumed(raw: dict[str, Any], tmp_path: Path) -> None:
    resume(raw, tmp_path)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_one_sentence(change: str, raw: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(raw)
    make, message = CHANGES[change]
    make(changed["run"])
    with pytest.raises(UserError, match=message) as caught:
        resume(changed, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_recipe_inside_is_named_with_its_file(raw: dict[str, Any], tmp_path: Path) -> None:
    changed = copy.deepcopy(raw)
    changed["recipe"]["optim"]["lr_per_image"] = 1e300
    with pytest.raises(UserError, match=r"last\.pt: key 'optim\.lr_per_image'"):
        resume(changed, tmp_path)
