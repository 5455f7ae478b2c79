"""What a loaded mmdetection file computes: its head against the reference vectors, its backbone against torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tests.nn.test_mmdet_weights import CONFIG_2, checkpoint
from tests.parity.vectors import Case, cases
from yoloxkd.assembly.models import open_model
from yoloxkd.nn.dense.fpn_detector import FPNDetector
from yoloxkd.ops.boxes import from_distances

FORWARD = [(family, param.values[0]) for family in ("fcos", "gfl") for param in cases(family, "forward")]


def opened(state: dict[str, Tensor], file: Path, meta: dict[str, str] | None = None) -> FPNDetector:
    """The detector behind a state dict in mmdetection's names, by way of a file."""
    torch.save({"meta": meta or {}, "state_dict": state}, file)
    found = open_model(str(file))
    assert found.report.complete
    assert isinstance(found.detector, FPNDetector)
    return found.detector


@pytest.mark.parametrize(("family", "case"), FORWARD, ids=[family for family, _ in FORWARD])
def test_the_head_of_a_file_gives_the_reference_outputs(family: str, case: Case | None, tmp_path: Path) -> None:
    """The vectors' weights under mmdetection's names, in a file, through the key map: the reference's outputs.

    Computed in float64 from there on: what float32 arithmetic adds differs between processors, by more than the bounds here.
    """
    if case is None:
        pytest.skip("the reference vectors are not there (set YOLOXKD_VECTORS)")
    features = tuple(case.tensor(n).double() for n in case.family("feat"))
    channels = features[0].shape[1]
    state = checkpoint(
        family, "resnet50", classes=case.params["C"], channels=channels, stacked_convs=case.params["convs"]
    )
    theirs = {f"bbox_head.{n.removeprefix('w__')}": case.tensor(n).float() for n in case.family("w")}
    assert theirs.keys() <= state.keys()
    detector = opened(state | theirs, tmp_path / "x.pth").double()
    height, width = features[0].shape[2:]
    with torch.no_grad():
        out = detector.on_features(features, (8 * height, 8 * width))

    def stored(name: str) -> Tensor:
        return torch.cat([case.tensor(n).flatten(2) for n in case.family(name)], 2).transpose(1, 2).double()

    torch.testing.assert_close(out.cls_logits, stored("out_cls"), rtol=1e-4, atol=1e-5)
    if family == "fcos":
        assert out.quality is not None
        torch.testing.assert_close(out.quality, stored("out_centre")[..., 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.box_raw, stored("out_reg_train"), rtol=1e-4, atol=1e-5)
        expected = from_distances(out.grid.points, stored("out_reg_eval"))
        torch.testing.assert_close(out.boxes, expected, rtol=1e-4, atol=1e-3)
    else:
        torch.testing.assert_close(out.box_raw, stored("out_reg"), rtol=1e-4, atol=1e-5)


def shaken(model: nn.Module) -> nn.Module:
    """Random norms too, so that every tensor matters."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def resnet(caffe: bool) -> tuple[dict[str, Tensor], Callable[[Tensor], list[Tensor]]]:
    """torchvision's ResNet-50, whose names mmdetection shares; in caffe style the 1x1 convolution halves the map."""
    model = shaken(torchvision.models.resnet50(weights=None))
    for stage in (model.layer2, model.layer3, model.layer4):
        if caffe:
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)

    def maps(x: Tensor) -> list[Tensor]:
        x = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        out = []
        for stage in (model.layer2, model.layer3, model.layer4):
            x = stage(x)
            out.append(x)
        return out

    return {f"backbone.{k}": v for k, v in model.state_dict().items() if not k.startswith("fc.")}, maps


def mobilenet() -> tuple[dict[str, Tensor], Callable[[Tensor], list[Tensor]]]:
    """torchvision's MobileNetV2 under mmdetection's names."""
    model = shaken(torchvision.models.mobilenet_v2(weights=None))
    state, place = {}, {}
    blocks = [(stage, block) for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1), 1) for block in range(count)]
    for index, (stage, block) in enumerate(blocks, 1):
        layers = ["expand_conv", "depthwise_conv", "linear_conv"][0 if stage > 1 else 1 :]
        for n, layer in enumerate(layers):
            pair = (f"conv.{n}", f"conv.{n + 1}") if layer == "linear_conv" else (f"conv.{n}.0", f"conv.{n}.1")
            for theirs, kind in zip(pair, ("conv", "bn"), strict=True):
                place[f"features.{index}.{theirs}."] = f"layer{stage}.{block}.{layer}.{kind}."
    for index, name in ((0, "conv1"), (18, "conv2")):
        place |= {f"features.{index}.0.": f"{name}.conv.", f"features.{index}.1.": f"{name}.bn."}
    for key, value in model.state_dict().items():
        head = next((h for h in place if key.startswith(h)), None)
        if head:
            state["backbone." + place[head] + key.removeprefix(head)] = value

    def maps(x: Tensor) -> list[Tensor]:
        out = []
        for index, layer in enumerate(model.features):
            x = layer(x)
            if index in (6, 13, 18):
                out.append(x)
        return out

    return state, maps


@pytest.mark.parametrize("kind", ["pytorch", "caffe", "mobilenetv2"])
def test_the_backbone_of_a_file_gives_torchvisions_maps(kind: str, tmp_path: Path) -> None:
    name = "mobilenetv2_100" if kind == "mobilenetv2" else "resnet50"
    weights, maps = mobilenet() if kind == "mobilenetv2" else resnet(kind == "caffe")
    extra = {"last_conv": True} if kind == "mobilenetv2" else {}
    state = checkpoint("fcos", name, **extra)
    assert weights.keys() == {k for k in state if k.startswith("backbone.")}
    detector = opened(state | weights, tmp_path / "x.pth", {"config": CONFIG_2} if kind == "caffe" else None)
    pixels = torch.rand(1, 3, 64, 96) * 255
    if kind == "caffe":
        mean = torch.tensor([102.9801, 115.9465, 122.7717]).view(1, 3, 1, 1)
        expected_input = pixels.flip(1) - mean
    else:
        mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
        expected_input = (pixels - mean) / torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    with torch.no_grad():
        normalized = detector.normalize(pixels)
        torch.testing.assert_close(normalized, expected_input)
        ours, theirs = detector.backbone(normalized), maps(expected_input)
    for a, b in zip(ours, theirs, strict=True):
        assert b.std() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
