"""Parameters and operations of the six sizes against the published figures."""

from __future__ import annotations

import pytest
import torch

from yoloxkd.assembly.models import build_detector
from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import read_yaml
from yoloxkd.nn.complexity import complexity
from yoloxkd.nn.dense.yolox import YOLOX


# M parameters and G operations at a size, as in the tables of the YOLOX release
@pytest.mark.parametrize(
    ("size", "imgsz", "parameters", "flops"),
    [
        ("nano", 416, 0.91, 1.08),
        ("tiny", 416, 5.06, 6.45),
        ("s", 640, 9.0, 26.8),
        ("m", 640, 25.3, 73.8),
        ("l", 640, 54.2, 155.6),
        ("x", 640, 99.1, 281.9),
    ],
)
def test_published_figures(size: str, imgsz: int, parameters: float, flops: float) -> None:
    keys = read_yaml(cfg_folder() / "models" / f"yolox-{size}.yaml")
    assert keys.pop("family") == "yolox"
    with torch.device("meta"):
        model = YOLOX(YOLOX.Config(**keys), [str(i) for i in range(80)])
    found = complexity(model, imgsz)
    digits = 2 if imgsz == 416 else 1
    assert round(found.parameters / 1e6, digits) == parameters
    assert round(found.flops / 1e9, digits) == flops


@pytest.mark.parametrize("name", ["cascade-rcnn", "ddod", "gfl", "reppoints"])
def test_a_family_with_operators_that_need_values_is_counted(name: str) -> None:
    with torch.device("meta"):
        model = build_detector({"name": f"{name}-mobilenetv2"}, [str(i) for i in range(80)])
    assert complexity(model, 64).flops > 1e6


def test_the_detector_stays_as_it_was() -> None:
    model = YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=True), ["a"])
    model.backbone.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    square, wide = complexity(model, 32), complexity(model, (32, 64))
    assert wide.parameters == square.parameters == sum(p.numel() for p in model.parameters())
    assert wide.flops == 2 * square.flops
    assert "M parameters" in square.describe()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
