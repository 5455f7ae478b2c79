"""Gradients of losses on the trunk: against plain autograd, and a log of them that changes no bit of the training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TINY
from tests.engine.runs import StopAt, same
from tests.kd.fakes import TinyDetector, make_state, tiny_yolox
from yoloxkd import Trainer
from yoloxkd.engine.callbacks.kd_gradients import KDGradients
from yoloxkd.engine.gradients import ALL, TASK_LOSS, LossGradient, average, loss_gradients, trunk
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.types import TASK, LossName


def test_the_trunk_is_backbone_and_neck_without_what_is_frozen() -> None:
    detector = tiny_yolox()
    next(detector.backbone.parameters()).requires_grad_(False)
    names = {id(p): name for name, p in detector.named_parameters()}
    found = [names[id(p)] for p in trunk(detector)]
    assert len(found) == len(list(detector.backbone.parameters())) - 1
    assert all(name.startswith("backbone.") for name in found)
    tiny = TinyDetector()
    assert {id(p) for p in trunk(tiny)} == {id(p) for m in (tiny.backbone, tiny.neck) for p in m.parameters()}


def test_norms_shares_cosines_and_sums_are_those_of_plain_autograd() -> None:
    p, unused = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.ones(1))
    losses = {
        LossName(TASK, "box"): p[0] * 2,
        LossName(TASK, "cls"): p[0] * 4,
        LossName("pgd", "fg", 8): p[0] * 3 + p[1] * 4,
        LossName("pgd", "fg", 16): p[1] * 2,
        LossName("pgd", "bg", 8): -p[0] * 3,
        LossName("pgd", "off", 8): torch.zeros(()),
    }
    found = loss_gradients(losses, [p, unused])
    assert found[TASK_LOSS] == LossGradient(18.0, 6.0, 1.0, 1.0)
    one = found[LossName("pgd", "fg", 8)]
    assert (one.loss, one.norm, one.share, one.cosine) == pytest.approx((25.0, 5.0, 5 / 6, 0.6))
    assert found[LossName("pgd", "fg")].norm == pytest.approx((3**2 + 6**2) ** 0.5)
    assert found[LossName("pgd", ALL, 8)].norm == pytest.approx(4.0)  # the two terms cancel in the first coordinate
    assert found[LossName("pgd", ALL)].cosine == pytest.approx(0.0)
    assert found[LossName("pgd", "bg", 8)].cosine == pytest.approx(-1.0)
    assert found[LossName("pgd", "off", 8)] == LossGradient(0.0, 0.0, 0.0, 0.0)
    assert p.grad is None
    assert list(found)[:2] == [TASK_LOSS, LossName("pgd", ALL)]
    scaled = loss_gradients(losses, [p, unused], scale=1024.0)
    assert scaled[LossName("pgd", ALL)].norm == pytest.approx(found[LossName("pgd", ALL)].norm)


def test_means_over_batches_share_the_task_of_all_of_them() -> None:
    pgd = LossName("pgd", ALL)
    batches = [
        {TASK_LOSS: LossGradient(1.0, norm, 1.0, 1.0), pgd: LossGradient(2.0, 6.0, 6.0 / norm, cosine)}
        for norm, cosine in ((1.0, 0.5), (3.0, -0.1))
    ]
    mean = average(batches)
    assert mean[TASK_LOSS].norm == 2.0
    assert mean[pgd].share == 3.0
    assert mean[pgd].cosine == pytest.approx(0.2)


def options(toy: Path, toy_run: Path) -> dict[str, Any]:
    return {
        "student": "yolox-nano",
        "teacher": str(toy_run / "best.pt"),
        "kd": "pgd",
        "data": str(toy),
        "epochs": 1,
        "batch": 8,
        "imgsz": 64,
        "device": "cpu",
    }


@pytest.mark.slow
def test_logging_changes_no_bit_of_the_run_and_goes_on_after_a_resume(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    keys, settings = options(toy, toy_run), TINY | {"kd.auto_iterations": 2}
    Trainer(**keys, set=settings, out=tmp_path / "plain").fit()
    with pytest.raises(Interrupted):
        Trainer(
            **keys, set=settings | {"callbacks.kd_gradients.every": 2}, out=tmp_path / "logged", callbacks=[StopAt(2)]
        ).fit()
    Trainer(resume=tmp_path / "logged").fit()
    plain, logged = (torch.load(tmp_path / f / "last.pt", weights_only=True) for f in ("plain", "logged"))
    assert same(plain["model"], logged["model"])
    for part in ("optimizer", "aux", "ema", "rng"):
        assert same(plain["run"][part], logged["run"][part]), part
    with open(tmp_path / "logged" / "kd_gradients.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "3"]
    assert float(rows[0]["share/pgd/all"]) == 0.0  # auto only measures in the first step
    assert float(rows[1]["share/pgd/all"]) > 0.0
    assert float(rows[1]["share/pgd/all/s8"]) > 0.0
    assert -1.0 <= float(rows[1]["cosine/pgd/cls_fg/s8"]) <= 1.0
    assert not (tmp_path / "plain" / "kd_gradients.csv").exists()


def test_a_compiled_model_is_refused() -> None:
    state, _ = make_state(TinyDetector())
    state.recipe.engine.compile = True
    with pytest.raises(UserError, match=r"engine\.compile=false"):
        KDGradients().on_fit_start(state)
