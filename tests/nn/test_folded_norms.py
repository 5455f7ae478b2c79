"""Batch norms folded into convolutions: the same outputs, and what cannot be folded is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nn.contract import pictures
from tests.nn.fpn import SHALLOW, narrow
from tests.nn.two_stage.contract import narrow_two_stage
from yoloxkd.assembly.models import build_detector
from yoloxkd.nn.dense.gfl import GFL
from yoloxkd.nn.folded_norms import fold_norms
from yoloxkd.nn.two_stage.mask_rcnn import MaskRCNN


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with norms that do something, in evaluation mode."""
    g = torch.Generator().manual_seed(0)
    for norm in norms(model):
        for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.5)):
            assert tensor is not None
            tensor.data = low + torch.rand(tensor.shape, generator=g)
    return model.eval()


@pytest.mark.parametrize("kind", ["yolox", "mobilenet", "resnet", "two stages"])
def test_outputs_stay_the_same(kind: str) -> None:
    torch.manual_seed(0)
    names = ["a", "b"]
    model: Any = with_statistics(
        build_detector({"name": "yolox-nano", "width": 0.125}, names)
        if kind == "yolox"
        else narrow_two_stage(MaskRCNN, names)
        if kind == "two stages"
        else narrow(GFL, names, **({"backbone": SHALLOW} if kind == "resnet" else {}))
    )
    images = pictures(2, 64, 96)
    folded = copy.deepcopy(model).to(memory_format=torch.channels_last)
    count = fold_norms(folded, torch.zeros(1, 3, 64, 64))
    assert count == len(norms(model)) > 0
    assert norms(folded) == []
    with torch.no_grad():
        for expected, given in zip(maps(model(images)), maps(folded(images)), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def maps(out: Any) -> list[Tensor]:
    """Feature maps and predictions of an output."""
    dense = getattr(out, "rpn", out)
    return [*dense.backbone_features, *dense.features, dense.cls_logits, dense.box_raw]


class Several(nn.Module):
    """A norm with a convolution of its own, one whose convolution others read, one of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a = self.norms[0](self.convs[0](x))
        b = self.convs[1](a)
        c = self.norms[1](b) + b
        y: Tensor = self.norms[2](self.convs[2](c)) + self.norms[2](self.convs[3](c))
        return y


def test_what_others_read_is_left_alone() -> None:
    torch.manual_seed(0)
    model = with_statistics(Several())
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    assert fold_norms(model, x) == 1
    assert len(norms(model)) == 2
    torch.testing.assert_close(model(x), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
