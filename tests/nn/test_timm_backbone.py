"""Backbones of timm: strides and channels, what is frozen, padding, the caffe style."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.nn.backbones.timm_backbone import TimmBackbone, input_convention

SMALL = "mobilenetv2_035"


@pytest.mark.parametrize(
    ("name", "channels"),
    [(SMALL, (16, 32, 112)), ("resnet18", (128, 256, 512)), ("tf_efficientnet_lite0", (40, 112, 320))],
)
def test_maps_of_strides_8_16_32(name: str, channels: tuple[int, ...]) -> None:
    backbone = TimmBackbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    assert backbone.channels == channels
    assert [tuple(m.shape[1:]) for m in maps] == [
        (c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]


def test_a_network_of_one_input_size_is_refused() -> None:
    with pytest.raises(UserError, match="one size only"):
        TimmBackbone("swin_tiny_patch4_window7_224")


def test_stages_go_by_stride_where_the_stem_has_no_map() -> None:
    frozen = [n for n, p in TimmBackbone("test_convnext", frozen_stages=1).named_parameters() if not p.requires_grad]
    assert {n.split(".")[1] for n in frozen} == {"stem_0", "stem_1", "stages_0"}


@pytest.mark.parametrize("name", ["resnet1", "mobilenet_v2_100x"])
def test_an_unknown_name_is_the_users_mistake(name: str) -> None:
    with pytest.raises(UserError, match=f"unknown backbone '{name}'"):
        TimmBackbone(name)


def test_a_backbone_without_the_strides_is_refused() -> None:
    with pytest.raises(UserError, match="strides"):
        TimmBackbone("vit_tiny_patch16_224")


def trained(backbone: TimmBackbone) -> set[str]:
    return {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}


def test_frozen_stages_are_the_stem_and_so_many_stages() -> None:
    everything = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert trained(TimmBackbone("resnet18")) == everything
    assert trained(TimmBackbone("resnet18", frozen_stages=1)) == {"layer2", "layer3", "layer4"}
    assert trained(TimmBackbone("resnet18", frozen_stages=3)) == {"layer4"}
    with pytest.raises(UserError, match=r"frozen_stages 5.*no such stage"):
        TimmBackbone("resnet18", frozen_stages=5)


def test_frozen_stages_of_nested_names() -> None:
    frozen = [n for n, p in TimmBackbone(SMALL, frozen_stages=1).named_parameters() if not p.requires_grad]
    places = {".".join(n.split(".")[1:3]) for n in frozen}
    assert places == {"conv_stem.weight", "bn1.weight", "bn1.bias", "blocks.0", "blocks.1"}


def test_norms_can_be_frozen_whole() -> None:
    backbone = TimmBackbone("resnet18", norm_eval=True, norm_frozen=True)
    learnt = {n.rpartition(".")[0] for n, p in backbone.named_parameters() if p.requires_grad}
    assert learnt == {n for n, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
    backbone.freeze(0, norm_eval=True)
    assert all(p.requires_grad for p in backbone.parameters())


def test_the_last_convolution_is_timms() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone(SMALL, last_conv=True).eval()
    assert backbone.channels == (16, 32, 1280)
    whole: Any = timm.create_model(SMALL, pretrained=False).eval()
    state = backbone.body.state_dict()
    whole.load_state_dict({k: state.get(k, v) for k, v in whole.state_dict().items()})
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image)[-1], whole.forward_features(image))
    with pytest.raises(UserError, match=r"last_conv is for MobileNetV2.*'resnet18'"):
        TimmBackbone("resnet18", last_conv=True)


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def statistics(module: nn.Module) -> list[Tensor]:
    return [b.clone() for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))]


@pytest.mark.parametrize("name", ["resnet18", SMALL])
@pytest.mark.parametrize(("stages", "norm_eval"), [(0, False), (0, True), (2, False)])
def test_what_is_frozen_stays_so_in_training_mode(name: str, stages: int, norm_eval: bool) -> None:
    backbone = TimmBackbone(name, frozen_stages=stages, norm_eval=norm_eval)
    before = statistics(backbone)
    backbone.eval().train()(torch.rand(2, 3, 64, 64))
    same = [torch.equal(a, b) for a, b in zip(before, statistics(backbone), strict=True)]
    assert all(same) == norm_eval
    assert any(same) == (norm_eval or stages > 0)
    assert all(m.training for m in norms(backbone)) == (not norm_eval and stages == 0)
    assert not any(m.training for m in backbone.eval().modules())


def test_freezing_can_be_chosen_anew() -> None:
    backbone = TimmBackbone("resnet18", frozen_stages=2, norm_eval=True).train()
    backbone.freeze(0, norm_eval=False)
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(m.training for m in backbone.modules())


def test_same_padding_is_timms() -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("tf_efficientnet_lite0").eval()
    plain: Any = timm.create_model("tf_efficientnet_lite0", features_only=True, pretrained=False).eval()
    plain.load_state_dict(backbone.body.state_dict())
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(backbone(image), plain(image)[2:], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_caffe_style_moves_the_stride_into_the_1x1() -> None:
    caffe = TimmBackbone("resnet26", style="caffe")
    blocks = [m for n, m in caffe.named_modules() if n.endswith("layer2.0")]
    assert blocks[0].get_submodule("conv1").stride == (2, 2)
    assert blocks[0].get_submodule("conv2").stride == (1, 1)
    for norm in norms(caffe):
        nn.init.ones_(norm.get_parameter("weight"))  # timm starts residual branches at zero
    plain = TimmBackbone("resnet26")
    plain.load_state_dict(caffe.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = caffe.eval()(image), plain.eval()(image)
    assert [m.shape for m in ours] == [m.shape for m in theirs]
    assert not torch.allclose(ours[0], theirs[0])
    with pytest.raises(UserError, match="caffe"):
        TimmBackbone(SMALL, style="caffe")


def test_input_conventions_are_those_of_the_weights() -> None:
    lite = input_convention("tf_efficientnet_lite0")
    assert lite.mean == lite.std == (127.5, 127.5, 127.5)
    resnet = input_convention("resnet50")
    assert resnet.mean == pytest.approx((123.675, 116.28, 103.53))
    assert resnet.std == pytest.approx((58.395, 57.12, 57.375))
    assert resnet.pad_value == (124, 116, 104)
    assert not resnet.bgr
