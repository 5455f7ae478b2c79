"""Parameter groups, the optimizer, and the ends of the learning-rate schedule."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.vectors import vectors_folder
from yoloxkd.assembly.recipes import resolve
from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import read_yaml
from yoloxkd.config.recipe import OptimSection
from yoloxkd.engine.optim import LEAST_SIZE, learning_rate, optimizer, parameter_groups, sgd, step_lr, yolox_lr
from yoloxkd.nn.dense.yolox import YOLOX


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
    optimizer = sgd([model], 0.1, OptimSection())
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
    groups = parameter_groups([nn.Sequential(norm, frozen), linear, scale], OptimSection(weight_decay=0.01))
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
    assert sgd([nn.Linear(1, 1)], 0.1, OptimSection(momentum=0.0)).param_groups[0]["nesterov"] is False


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


def test_steps_are_those_of_mmdetection() -> None:
    """A 1x run of 0.02: linear from a thousandth over 500 iterations, a tenth after 8 epochs and again after 11."""
    one_x = {"base_lr": 0.02, "iters_per_epoch": 1000, "milestones": [8, 11], "gamma": 0.1}
    rates = [step_lr(i, warmup_iters=500, warmup_ratio=0.001, **one_x) for i in range(12000)]  # type: ignore[arg-type]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[250] == pytest.approx(0.02 * (1 - 0.5 * 0.999))  # mmcv: regular rate * (1 - (1 - i / n) * (1 - ratio))
    assert rates[499] < 0.02
    assert rates[500] == rates[7999] == pytest.approx(0.02)
    assert rates[8000] == rates[10999] == pytest.approx(2e-3)
    assert rates[11000] == rates[-1] == pytest.approx(2e-4)
    assert step_lr(0, warmup_iters=0, warmup_ratio=0.001, **one_x) == 0.02  # type: ignore[arg-type]
    early = {**one_x, "milestones": [1], "iters_per_epoch": 100}
    assert step_lr(250, warmup_iters=500, warmup_ratio=0.0, **early) == pytest.approx(1e-3)  # type: ignore[arg-type]


def test_a_recipe_chooses_its_schedule() -> None:
    def rates(*sets: str, epochs: int = 12) -> list[float]:
        keys = ["optim.lr_per_image=0.001", "train.batch=10", *sets]
        recipe = resolve(student="yolox-nano", epochs=epochs, sets=keys)
        return [learning_rate(recipe, i, 10) for i in range(10 * epochs)]

    stepped = rates("schedule.kind=step")
    assert stepped[0] == pytest.approx(1e-5)
    assert stepped[12] == stepped[79] == pytest.approx(0.01)  # a tenth of 120 iterations of warm-up
    assert stepped[80] == stepped[109] == pytest.approx(1e-3)
    assert stepped[110] == pytest.approx(1e-4)
    own = rates("schedule.kind=step", "schedule.warmup_iters=3", "schedule.milestones=[2]", "schedule.gamma=0.5")
    assert (own[3], own[19], own[20], own[-1]) == pytest.approx((0.01, 0.01, 0.005, 0.005))
    smooth = rates()
    assert (smooth[0], smooth[10]) == (0, pytest.approx(0.01))
    assert len({round(rate, 9) for rate in smooth[11:100]}) == 89


def test_what_decays_and_how_fast_biases_learn() -> None:
    optim = OptimSection(weight_decay=0.01, decay="all", bias_lr=2.0)
    groups = sgd([nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)], 0.1, optim).param_groups
    assert [g["weight_decay"] for g in groups] == [0.01] * 3
    assert [g["lr_factor"] for g in groups] == [1.0, 1.0, 2.0]
    assert [g["lr_factor"] for g in sgd([nn.Conv2d(1, 1, 1)], 0.1, OptimSection()).param_groups] == [1.0] * 3


def test_adam_moves_every_tensor_by_the_same_part_of_its_size() -> None:
    layer = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        layer.weight.fill_(90.0)
        assert layer.bias is not None
        layer.bias.fill_(0.0)
    made = optimizer([layer], 0.01, OptimSection(kind="adam", weight_decay=0.0, bias_lr=2.0))
    for group in made.param_groups:
        group["lr"] = 0.01 * group["lr_factor"]  # as a training step does
    (layer.weight.sum() * 1e-3 - layer.bias.sum()).backward()
    made.step()
    torch.testing.assert_close(layer.weight.detach(), torch.full((2, 2, 1, 1), 90 - 0.9), rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.bias.detach(), torch.full((2,), 0.01 * 2.0 * LEAST_SIZE))
