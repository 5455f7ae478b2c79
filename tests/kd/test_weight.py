"""Warm-up, end and the automatic weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from yoloxkd.errors import UserError
from yoloxkd.kd.base import KDConfig
from yoloxkd.kd.weight import MethodWeight

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", ["automatic", -1.0, float("nan"), None, [1]])
def test_weight_is_a_number_or_auto(value: object) -> None:
    with pytest.raises(ValidationError, match="a number of at least 0, or auto") as error:
        KDConfig(weight=value)
    assert error.value.errors()[0]["loc"] == ("weight",)


def test_warmup_is_linear_in_steps() -> None:
    weight = MethodWeight(KDConfig(weight=2.0, warmup=1.5), iters_per_epoch=4, epochs=8)
    found = [weight.at(i // 4, i, CPU) for i in range(8)]
    assert found == pytest.approx([2 * min(1.0, (i + 1) / 6) for i in range(8)])


def test_stop_epoch_counts_the_epochs_that_are_distilled() -> None:
    weight = MethodWeight(KDConfig(stop_epoch=2), iters_per_epoch=4, epochs=8)
    assert [weight.at(e, 4 * e, CPU) for e in range(4)] == [1.0, 1.0, 0.0, 0.0]


def factors(steps: range, **keys: Any) -> list[float]:
    cfg = KDConfig(**keys)
    weight = MethodWeight(cfg, iters_per_epoch=4, epochs=3)
    return [float(weight.at(i // 4, i, CPU)) for i in steps]


def test_linear_decay_ends_at_its_floor_with_the_last_step() -> None:
    found = factors(range(12), weight=2.0, decay="linear", decay_floor=0.1)
    assert found == pytest.approx([2 * (1 - 0.9 * i / 11) for i in range(12)])
    assert found[-1] == pytest.approx(0.2)


def test_cosine_decay_is_damo_yolos() -> None:
    """Its trainer has (1 - cos(pi i / total)) / 2 (0.1 - 1) + 1 at iteration i; here the last iteration is at the end."""
    found = factors(range(12), decay="cosine", decay_floor=0.1)
    assert found == pytest.approx([(1 - math.cos(math.pi * i / 11)) / 2 * (0.1 - 1) + 1 for i in range(12)])


def test_decay_ends_with_the_distillation_or_where_it_is_told_to_and_stays_there() -> None:
    assert factors(range(12), decay="linear", stop_epoch=2)[7:] == [0.0] * 5
    early = factors(range(12), decay="linear", decay_floor=0.5, decay_epochs=1)
    assert early == pytest.approx([1, 5 / 6, 4 / 6, 0.5, *[0.5] * 8])
    both = factors(range(12), decay="linear", warmup=0.5)
    assert both == pytest.approx([0.5, *[1 - i / 11 for i in range(1, 12)]])


def test_decay_applies_to_a_measured_factor() -> None:
    weight = MethodWeight(KDConfig(weight="auto", auto_iterations=1, decay="linear"), iters_per_epoch=4, epochs=3)
    weight.observe(torch.tensor(4.0), torch.tensor(1.0))
    assert weight.at(1, 5, CPU) == pytest.approx(2.0 * (1 - 5 / 11))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {"decay": "linear", "decay_epochs": 11},
            r"kd\.decay_epochs 11 of pgd is after.*\(epoch 10\).*never reaches its floor",
        ),
        ({"decay": "cosine", "decay_epochs": 6, "stop_epoch": 5}, r"after the distillation's end \(epoch 5\)"),
        ({"decay": "linear", "decay_epochs": 2, "warmup": 2}, r"kd\.warmup 2 of pgd lasts until its decay has ended"),
    ],
)
def test_a_decay_that_does_not_fit_the_run_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        KDConfig(**keys).check_length(10, "pgd")
    KDConfig(decay="linear", decay_epochs=10).check_length(10, "pgd")


@pytest.mark.parametrize("keys", [{"decay_floor": 0.1}, {"decay_epochs": 3}])
def test_keys_of_a_decay_without_one_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="belongs to a decay, and decay is none"):
        KDConfig(**keys)


def test_auto_reaches_its_share_and_stays() -> None:
    weight = MethodWeight(KDConfig(weight="auto", auto_share=0.25, auto_iterations=3), iters_per_epoch=4, epochs=8)
    first = weight.at(0, 0, CPU)
    assert isinstance(first, torch.Tensor)
    assert float(first) == 0.0  # nothing is known yet: the first step only measures
    for step, (task, own) in enumerate([(8.0, 2.0), (4.0, 1.0), (6.0, 3.0)]):
        fixed = weight.observe(torch.tensor(task), torch.tensor(own))
        assert fixed == (step == 2)
        if step == 0:
            assert float(weight.at(0, 1, CPU)) == pytest.approx(0.25 * 8 / 2)
    assert weight.at(0, 3, CPU) == pytest.approx(0.25 * 18 / 6)
    assert weight.observe(torch.tensor(100.0), torch.tensor(1.0)) is False
    assert weight.at(5, 20, CPU) == pytest.approx(0.75)


@pytest.mark.parametrize("stop", [1, 2])
def test_auto_goes_on_from_its_state(stop: int) -> None:
    cfg = KDConfig(weight="auto", auto_iterations=3)
    steps = [(torch.rand(()), torch.rand(())) for _ in range(3)]
    whole, first, second = (MethodWeight(cfg, 4, 8) for _ in range(3))
    for step in steps:
        whole.observe(*step)
    for step in steps[:stop]:
        first.observe(*step)
    second.load_state_dict(first.state_dict(), CPU)
    assert torch.equal(torch.as_tensor(second.at(0, stop, CPU)), torch.as_tensor(first.at(0, stop, CPU)))
    for step in steps[stop:]:
        second.observe(*step)
    assert second.fixed == whole.fixed
    third = MethodWeight(cfg, 4, 8)
    third.load_state_dict(second.state_dict(), CPU)
    assert third.at(0, 3, CPU) == whole.fixed


def test_auto_leaves_out_what_is_not_finite_and_survives_zero() -> None:
    weight = MethodWeight(KDConfig(weight="auto", auto_iterations=2, auto_share=0.5), iters_per_epoch=4, epochs=8)
    weight.observe(torch.tensor(float("nan")), torch.tensor(1.0))
    weight.observe(torch.tensor(4.0), torch.tensor(1.0))
    assert weight.fixed == pytest.approx(2.0)
    silent = MethodWeight(KDConfig(weight="auto", auto_iterations=2), iters_per_epoch=4, epochs=8)
    silent.observe(torch.tensor(1.0), torch.tensor(0.0))
    assert float(silent.at(0, 1, CPU)) == 0.0
    silent.observe(torch.tensor(1.0), torch.tensor(0.0))
    assert silent.fixed == 1.0
