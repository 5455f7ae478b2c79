"""They learn: each family overfits eight pictures of coloured rectangles."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.conftest import write_toy
from tests.nn.fpn import narrow
from yoloxkd.data.loader import eval_loader
from yoloxkd.data.spec import find_data, load_split
from yoloxkd.engine.evaluate import TorchPredictor, evaluate
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.detector import DenseDetector
from yoloxkd.nn.yolox import YOLOX

SIZE = 64
STEPS = 120
RATE = {"yolox": 1e-2}
"""Peak learning rate, where it is not 3e-3."""
SEED = 2
"""Pictures in which no rectangle hides another."""


def build(family: str, names: list[str]) -> DenseDetector:
    torch.manual_seed(0)
    if family == "yolox":
        return YOLOX(YOLOX.Config(depth=0.33, width=0.25), names)
    keys = {"backbone": "test_byobnet", "channels": 48, "groups": 8, "stacked_convs": 1}
    model: DenseDetector = narrow(DETECTORS[family], names, **keys)  # type: ignore[arg-type]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", DETECTORS)
def test_overfits_eight_pictures(family: str, tmp_path: Path) -> None:
    data = load_split(find_data(str(write_toy(tmp_path, images=8, size=SIZE, seed=SEED))), "train")
    model = build(family, data.names).train()
    loader = eval_loader(data, imgsz=SIZE, batch=8, workers=0, pad_value=model.input.pad_value)
    batch = next(iter(loader))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(STEPS):
        rate = RATE.get(family, 3e-3) * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = torch.stack(list(model.losses(model(batch.images), batch.targets).values())).sum()
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
        optimizer.step()
    metrics = evaluate(TorchPredictor(model, conf=0.05, iou=0.6), loader, data).metrics
    assert metrics["AP50"] > 0.95
