"""Whole runs under several teachers: everything that distillation keeps survives an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY
from tests.engine.test_runs import StopAt, rows, same, weights
from yoloxkd import Trainer
from yoloxkd.errors import Interrupted, UserError

SETTINGS = TINY | {
    "student.width": 0.25,
    "teacher.weight": [1.0, 0.5],
    "kd.pgd.weight": "auto",
    "kd.pgd.auto_iterations": 3,
}
OPTIONS: dict[str, Any] = {
    "student": "yolox-nano",
    "kd": ["pgd", "mgd"],
    "epochs": 2,
    "batch": 4,
    "imgsz": 64,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def teachers(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One that knows red and blue, and one that knows blue and something else, with other weights."""
    raw = torch.load(toy_run / "best.pt", weights_only=True)
    raw["names"] = ["green", "blue"]
    raw["model"] = {k: v * 1.1 if k.endswith("conv.weight") else v for k, v in raw["model"].items()}
    other = tmp_path_factory.mktemp("other") / "other.pt"
    torch.save(raw, other)
    return [str(other), str(toy_run / "best.pt")]


@pytest.fixture(scope="module")
def keys(teachers: list[str], toy: Path) -> dict[str, Any]:
    return OPTIONS | {"data": str(toy), "teacher": teachers, "set": SETTINGS}


@pytest.fixture(scope="module")
def whole(keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Trainer(**keys, out=tmp_path_factory.mktemp("whole") / "run").fit().out


def test_the_log_and_the_table_name_every_teacher(whole: Path) -> None:
    log = (whole / "train.log").read_text()
    assert "pgd: kd.weight is fixed at" in log
    assert "this teacher's: blue" in log
    assert "this teacher's: red" in log
    terms = [name for name in rows(whole)[0] if name.startswith("loss/")]
    for name in ("pgd@1/cls_attention/s8", "pgd@2/cls_attention/s8", "mgd@1/generated/s16", "mgd@2/generated/s16"):
        assert f"loss/{name}" in terms


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [1, 2])  # in the first epoch; after its last step
def test_resuming_in_the_middle_of_measuring_changes_nothing(
    iteration: int, keys: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        Trainer(**keys, out=out, callbacks=[StopAt(iteration)]).fit()
    kept = torch.load(out / "last.pt", weights_only=True)["run"]["callbacks"]["kd"]
    assert kept["auto"]["pgd"]["fixed"] is None
    assert kept["auto"]["pgd"]["seen"] == iteration
    assert len(kept["teachers"]) == 2
    again = Trainer(resume=out).fit()
    assert same(weights(out / "last.pt"), weights(whole / "last.pt"))
    assert same(weights(again.best), weights(whole / "best.pt"))
    assert rows(out) == rows(whole)
    both = [torch.load(o / "last.pt", weights_only=True)["run"] for o in (out, whole)]
    assert same(both[0]["aux"], both[1]["aux"])
    assert same(*(run["callbacks"]["kd"]["auto"] for run in both))


def test_a_weight_for_each_teacher(teachers: list[str], toy: Path, tmp_path: Path) -> None:
    settings = TINY | {"teacher.weight": [1.0]}
    with pytest.raises(UserError, match=r"teacher\.weight has 1 number\(s\) for 2 teacher\(s\)"):
        Trainer(**OPTIONS | {"set": settings}, data=str(toy), teacher=teachers, out=tmp_path / "run")
    for value in ([1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match=r"teacher\.weight"):
            Trainer(**OPTIONS | {"set": TINY | {"teacher.weight": value}}, data=str(toy), teacher=teachers)
