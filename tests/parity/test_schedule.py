"""Learning-rate schedule and weight averaging against the reference vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.parity.vectors import Case, cases
from yoloxkd.engine.ema import ModelEMA
from yoloxkd.engine.optim import yolox_lr

TOLERANCE = 1e-9


@pytest.mark.parametrize("case", cases("schedule", "lr"))
def test_learning_rate(case: Case) -> None:
    got = [yolox_lr(int(i), **case.params) for i in case.array("iteration")]
    assert got == pytest.approx(case.array("lr").tolist(), rel=TOLERANCE, abs=1e-18)


class Bag(nn.Module):
    """A module whose state dict has the given names and values."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_buffer(last, value.clone())


@pytest.mark.parametrize("case", cases("schedule", "ema"))
def test_weight_averaging(case: Case) -> None:
    names = [n.removeprefix("start__") for n in case.family("start")]
    model = Bag({n: case.tensor(f"start__{n}") for n in names})
    params = case.params
    ema = ModelEMA(model, decay=params["max_decay"], ramp=params["time_constant"], updates=params["first_count"])
    steps = {n: case.tensor(f"step__{n}") for n in names if case.has(f"step__{n}")}
    expected = {n: case.tensor(f"ema__{n}") for n in names if case.has(f"ema__{n}")}
    assert expected
    for step in range(len(next(iter(steps.values())))):
        model.load_state_dict({n: v[step] for n, v in steps.items()}, strict=False)
        ema.update(model)
        assert ema.updates == int(case.array("updates")[step])
        averaged = ema.module.state_dict()
        for name, values in expected.items():
            torch.testing.assert_close(averaged[name], values[step], rtol=TOLERANCE, atol=1e-15)


@pytest.mark.parametrize("case", cases("schedule", "ema"))
def test_decay_at_an_update(case: Case) -> None:
    for updates, decay in zip(case.array("updates"), case.array("decay"), strict=True):
        model = Bag({"x": torch.ones(1, dtype=torch.float64)})
        ema = ModelEMA(
            model, decay=case.params["max_decay"], ramp=case.params["time_constant"], updates=int(updates) - 1
        )
        model.get_buffer("x").zero_()
        ema.update(model)
        assert float(ema.module.state_dict()["x"]) == pytest.approx(float(decay), rel=TOLERANCE)
