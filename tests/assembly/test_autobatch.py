"""`batch: auto` is measured by steps of the run itself, fills no more than it says, and leaves a number in the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.conftest import TINY
from yoloxkd import Trainer
from yoloxkd.assembly import autobatch
from yoloxkd.assembly.autobatch import FILLED, Measured, measure, with_measured_batch
from yoloxkd.assembly.recipes import check, resolve
from yoloxkd.cli.launch import batch_size
from yoloxkd.config.recipe import Recipe
from yoloxkd.errors import UserError

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="CPU memory is read from /proc")


def recipe(toy: Path, **changes: Any) -> Recipe:
    return resolve(student="yolox-nano", data=str(toy), batch="auto", imgsz=64, device="cpu", sets=TINY | changes)


def test_auto_is_read_from_anywhere(toy: Path) -> None:
    assert recipe(toy).train.measure_batch
    assert resolve(student="yolox-nano", data=str(toy), sets={"train.batch": "auto"}).train.measure_batch
    assert not resolve(student="yolox-nano", data=str(toy), batch=4).train.measure_batch
    assert check(recipe(toy).model_dump(by_alias=True, mode="json")) == recipe(toy)
    assert batch_size("auto") == "auto"
    assert batch_size("12") == 12
    with pytest.raises(UserError, match="number of images or auto, got 'many'"):
        batch_size("many")


@pytest.mark.slow
def test_the_number_is_in_the_recipe_of_the_run(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = Trainer(
        student="yolox-nano", data=str(toy), batch="auto", epochs=1, imgsz=64, device="cpu", set=TINY, out=out,
        console=Console(quiet=True),
    )  # fmt: skip
    trainer.fit()
    written = yaml.safe_load((out / "recipe.yaml").read_text())["train"]
    assert written["batch"] == trainer.recipe.train.batch == 2  # 24 images, 8 steps an epoch, of the sizes there are
    assert written["measure_batch"] is False
    assert "batch auto: 2 images a step" in (out / "train.log").read_text()


def test_memory_limits_the_batch(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autobatch, "STEPS", 1)
    found = measure(recipe(toy))
    assert all(peak >= 0 for peak in found.peaks.values())
    assert found.fits >= 1
    monkeypatch.setattr(autobatch, "measure", lambda r, files: Measured({1: 10**9, 2: 2 * 10**9}, 15 * 10**9, 12))
    chosen, reason = with_measured_batch(recipe(toy, **{"train.accumulate": 2}))
    assert chosen.train.batch == 24
    assert "(2 x 12)" in reason
    assert f"at most {FILLED:.0%} of 15.00 GB" in reason
    monkeypatch.setattr(autobatch, "measure", lambda r, files: Measured({1: 10**9}, 10**9, 0))
    with pytest.raises(UserError, match="not even one image a step fits"):
        with_measured_batch(recipe(toy))
