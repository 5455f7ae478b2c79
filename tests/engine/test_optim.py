"""Parameter groups, the optimizer, and the ends of the learning-rate schedule."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.vectors import vectors_folder
from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import read_yaml
from yoloxkd.engine.optim import parameter_groups, sgd, yolox_lr
from yoloxkd.nn.yolox import YOLOX


@pytest.mark.parametrize("size", ["nano", "tiny", "s"])
def test_groups_are_those_of_the_release(size: str) -> None:
    file = vectors_folder("yolox") / f"yolox_{size}_keys.json"
    if not file.is_file():
        pytest.skip(f"the reference keys are not at {file} (set YOLOXKD_VECTORS)")
    reference = json.loads(file.read_text())
    keys = read_yaml(cfg_folder() / "models" / f"yolox-{size}.yaml")
    keys.pop("family")
    model = YOLOX(YOLOX.Config(**keys), [str(i) for i in range(reference["classes"])])
    name_of = {id(p): name for name, p in model.named_parameters()}
    optimizer = sgd([model], lr=0.1)
    got = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert got == list(reference["optimizer_groups"].values())
    official = reference["optimizer"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == official["weight_decay"]
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"]) == (official["momentum"], official["nesterov"])


def test_groups_of_other_modules() -> None:
    norm = nn.LayerNorm([4, 1, 1])
    linear = nn.Linear(4, 2)
    frozen = nn.Conv2d(1, 1, 1).requires_grad_(False)
    scale = nn.Module()
    scale.scale = nn.Parameter(torch.ones(()))
    groups = parameter_groups([nn.Sequential(norm, frozen), linear, scale], 0.01)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [
        ("norm_weights", 0.0),
        ("weights", 0.01),
        ("biases", 0.0),
    ]
    names: dict[int, str] = {
        id(norm.weight): "norm", id(norm.bias): "norm bias", id(linear.weight): "linear", id(linear.bias): "linear bias",
        id(scale.scale): "scale",
    }  # fmt: skip
    assert [[names[id(p)] for p in g["params"]] for g in groups] == [
        ["norm", "scale"],
        ["linear"],
        ["norm bias", "linear bias"],
    ]


def test_without_momentum_nesterov_is_off() -> None:
    assert sgd([nn.Linear(1, 1)], lr=0.1, momentum=0.0).param_groups[0]["nesterov"] is False


PLAN: dict[str, Any] = {"base_lr": 0.1, "iters_per_epoch": 10, "total_epochs": 10, "min_lr_ratio": 0.05}


def test_warm_up_rises_to_the_peak_and_the_floor_stays() -> None:
    rates = [yolox_lr(i, warmup_epochs=2, no_aug_epochs=3, **PLAN) for i in range(101)]
    assert rates[0] == 0
    assert rates[20] == pytest.approx(0.1)
    assert rates[:21] == sorted(rates[:21])
    assert rates[20:70] == sorted(rates[20:70], reverse=True)
    assert rates[70:] == [pytest.approx(0.005)] * 31


@pytest.mark.parametrize(("warmup", "final"), [(0, 0), (0, 10), (10, 0), (5, 15), (12, 3)])
def test_short_plans_stay_between_zero_and_the_peak(warmup: int, final: int) -> None:
    rates = [yolox_lr(i, warmup_epochs=warmup, no_aug_epochs=final, **PLAN) for i in range(101)]
    assert all(0 <= rate <= 0.1 + 1e-12 for rate in rates)
    assert warmup > 0 or rates[0] > 0
