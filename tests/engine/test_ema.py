"""Averaged weights outside the reference vectors."""

from __future__ import annotations

import torch
from torch import nn

from yoloxkd.engine.ema import ModelEMA


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_the_average_is_for_evaluation_and_apart_from_the_model() -> None:
    live = model()
    ema = ModelEMA(live, decay=0.9998, ramp=2000)
    assert live.training
    assert not any(m.training for m in ema.module.modules())
    assert not any(p.requires_grad for p in ema.module.parameters())
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    with torch.no_grad():
        live[0].weight.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in ema.module.state_dict().items())


def test_statistics_are_averaged_and_counters_stay() -> None:
    live = model()
    ema = ModelEMA(live, decay=0.5, ramp=1e-9)
    live(torch.randn(8, 3, 4, 4) + 5)
    ema.update(live)
    averaged, now = ema.module.state_dict(), live.state_dict()
    assert int(now["1.num_batches_tracked"]) == 1
    assert int(averaged["1.num_batches_tracked"]) == 0
    torch.testing.assert_close(averaged["1.running_mean"], now["1.running_mean"] / 2)


def test_it_continues_where_it_was_saved() -> None:
    torch.manual_seed(0)
    live = model()
    first = ModelEMA(live, decay=0.9, ramp=3)
    steps = [
        {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in live.state_dict().items()} for _ in range(4)
    ]
    for step in steps[:2]:
        live.load_state_dict(step)
        first.update(live)
    second = ModelEMA(model(), decay=0.9, ramp=3)
    second.load_state_dict({k: v if k == "updates" else dict(v) for k, v in first.state_dict().items()})
    assert second.updates == 2
    for step in steps[2:]:
        live.load_state_dict(step)
        first.update(live)
        second.update(live)
    assert all(torch.equal(v, second.module.state_dict()[k]) for k, v in first.module.state_dict().items())
