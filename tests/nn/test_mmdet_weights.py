"""Checkpoints with mmdetection's names load key by key, with their style, color order and variants."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from yoloxkd.assembly.models import open_model, parse_student, read_weights
from yoloxkd.assembly.recipes import resolve
from yoloxkd.download import fetch
from yoloxkd.errors import UserError
from yoloxkd.kd.inherit import inherit_from
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.weights.load import load_into
from yoloxkd.nn.weights.mmdet_files import AT_COCO, ZOO
from yoloxkd.nn.weights.mmdet_weights import dense_state, our_key
from yoloxkd.nn.weights.published import PUBLISHED, Published

CONFIG_2 = """
model = dict(type='FCOS', backbone=dict(type='ResNet', depth=50, style='caffe'),
    bbox_head=dict(norm_on_bbox=True, centerness_on_reg=True, center_sampling=True, conv_bias=True))
img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
"""
CONFIG_3 = """
model = dict(backbone=dict(depth=101, style='pytorch'), data_preprocessor=dict(
    bgr_to_rgb=True, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], type='DetDataPreprocessor'))
"""


def their_key(key: str, mobile: bool) -> str:
    """Our name of a tensor -> mmdetection's."""
    if key.startswith("head."):
        return "bbox_head." + key.removeprefix("head.")
    if not key.startswith("backbone.body."):
        return key
    rest = key.removeprefix("backbone.body.")
    if not mobile:
        return "backbone." + rest
    if rest.startswith("conv_stem."):
        return "backbone.conv1.conv." + rest.removeprefix("conv_stem.")
    if rest.startswith("bn1."):
        return "backbone.conv1.bn." + rest.removeprefix("bn1.")
    if rest.startswith("conv_head."):
        return "backbone.conv2.conv." + rest.removeprefix("conv_head.")
    if rest.startswith("bn2."):
        return "backbone.conv2.bn." + rest.removeprefix("bn2.")
    _, stage, block, layer, leaf = rest.split(".")
    names = {"conv_pw": "expand_conv.conv", "bn1": "expand_conv.bn", "conv_dw": "depthwise_conv.conv"}
    names |= {"bn2": "depthwise_conv.bn", "conv_pwl": "linear_conv.conv", "bn3": "linear_conv.bn"}
    if stage == "0":
        names = {"conv_dw": "depthwise_conv.conv", "bn1": "depthwise_conv.bn"}
        names |= {"conv_pw": "linear_conv.conv", "bn2": "linear_conv.bn"}
    return f"backbone.layer{int(stage) + 1}.{block}.{names[layer]}.{leaf}"


def checkpoint(family: str, backbone: str, classes: int = 2, **keys: Any) -> dict[str, Tensor]:
    """A state dict as mmdetection names it, with random weights."""
    kind = DETECTORS[family]
    settings = {"backbone": backbone, "channels": 32, "stacked_convs": 2, "frozen_stages": 0, "norm_eval": True} | keys
    model = kind(kind.Config(**settings), [f"c{i}" for i in range(classes)])  # type: ignore[call-arg]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {their_key(k, "mobilenet" in backbone): v for k, v in model.state_dict().items()}
    state = {k: v for k, v in state.items() if not k.startswith("bbox_head.positives.")}  # of a run, and not there
    if family == "gfl":
        state["bbox_head.integral.project"] = torch.arange(17.0)
    return state


@functools.cache
def kept(family: str) -> dict[str, Tensor]:
    """One state dict a family, for tests that read and do not change it."""
    return checkpoint(family, "resnet50")


@pytest.mark.parametrize("family", ["fcos", "gfl", "atss", "retinanet", "autoassign", "ddod", "reppoints"])
@pytest.mark.parametrize("backbone", ["resnet50", "mobilenetv2_100"])
def test_every_tensor_finds_its_place(family: str, backbone: str, tmp_path: Path) -> None:
    """On a ResNet as version 2 writes files, on a MobileNetV2 as version 3 does."""
    torch.manual_seed(0)
    state, meta = checkpoint(family, backbone), {"CLASSES": ("cat", "dog")}
    read = dict(state)
    if backbone != "resnet50":
        read["data_preprocessor.mean"], meta = torch.zeros(3, 1, 1), {"dataset_meta": {"classes": ("cat", "dog")}}
    torch.save({"meta": meta, "state_dict": read}, tmp_path / "x.pth")
    opened = open_model(str(tmp_path / "x.pth"))
    assert opened.detector.family == family
    assert opened.name == f"{family}-{'r50' if backbone == 'resnet50' else 'mobilenetv2'}"
    assert opened.detector.names == ["cat", "dog"]
    assert opened.weights.kind == "mmdetection"
    assert opened.report.complete
    own = opened.detector.state_dict()
    for key, value in state.items():
        if "integral" not in key:
            assert torch.equal(own[our_key(key)], value), key


def test_version_2_names_its_style_and_variant_in_the_configuration() -> None:
    state = checkpoint("fcos", "resnet50", style="caffe")
    found = dense_state({"meta": {"config": CONFIG_2, "CLASSES": ("cat", "dog")}, "state_dict": state})
    assert found is not None
    s = found.section
    assert (s["name"], s["style"], s["bgr"]) == ("fcos-r50", "caffe", True)
    assert (s["mean"], s["std"]) == ((102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))
    assert (s["norm_on_bbox"], s["centerness_on_reg"], s["center_sampling"], s["conv_bias"]) == (True,) * 4


def test_version_3_likewise() -> None:
    state = checkpoint("gfl", "resnet101")
    meta = {"cfg": CONFIG_3, "dataset_meta": {"classes": ("cat", "dog")}}
    found = dense_state({"meta": meta, "state_dict": state})
    assert found is not None
    s = found.section
    assert (s["name"], s["backbone"], s["style"], s["bgr"], s["reg_max"]) == (
        "gfl-r101",
        "resnet101",
        "pytorch",
        False,
        16,
    )
    assert s["mean"] == (123.675, 116.28, 103.53)
    assert found.names == ["cat", "dog"]


def test_a_file_without_configuration_goes_by_its_name_then_by_its_weights() -> None:
    plain = checkpoint("fcos", "resnet50", conv_bias=False)
    found = dense_state(plain, "fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth")
    assert found is not None
    s = found.section
    assert (s["style"], s["bgr"], s["conv_bias"]) == ("caffe", True, False)
    assert (s["norm_on_bbox"], s["centerness_on_reg"], s["center_sampling"]) == (False,) * 3
    improved = dense_state(checkpoint("fcos", "resnet50"), "teacher.pth")
    assert improved is not None
    s = improved.section
    assert (s["style"], s["norm_on_bbox"], s["centerness_on_reg"], s["center_sampling"]) == (
        "pytorch",
        True,
        True,
        True,
    )


def test_the_file_decides_how_the_detector_reads_its_input(tmp_path: Path) -> None:
    state = checkpoint("fcos", "resnet50", style="caffe")
    torch.save({"meta": {"config": CONFIG_2}, "state_dict": state}, tmp_path / "x.pth")
    detector = open_model(str(tmp_path / "x.pth")).detector
    assert detector.spec.input.bgr
    assert detector.spec.input.pad_value == (123, 116, 103)
    pixel = torch.tensor([122.7717, 115.9465, 102.9801]).view(1, 3, 1, 1)
    assert detector.normalize(pixel).abs().max() < 1e-4
    assert detector.get_submodule("backbone.body.layer2.0.conv1").stride == (2, 2)


def test_names_of_version_1(tmp_path: Path) -> None:
    old = {
        k.replace("conv_cls", "fcos_cls")
        .replace("conv_reg", "fcos_reg")
        .replace("conv_centerness", "fcos_centerness"): v
        for k, v in checkpoint("fcos", "resnet50").items()
    }
    torch.save(old, tmp_path / "x.pth")
    assert open_model(str(tmp_path / "x.pth")).report.complete


def batch_norm(state: dict[str, Tensor]) -> None:
    state["bbox_head.cls_convs.0.bn.weight"] = torch.zeros(1)


def deformable(state: dict[str, Tensor]) -> None:
    state["bbox_head.cls_convs.0.conv.conv_offset.weight"] = torch.zeros(1)


def wide(state: dict[str, Tensor]) -> None:
    state["backbone.layer1.0.conv2.weight"] = torch.zeros(128, 16, 3, 3)


@pytest.mark.parametrize(
    ("change", "words"), [(batch_norm, "batch norm"), (deformable, "deformable"), (wide, "other than ResNet")]
)
def test_what_is_not_supported_is_said(change: Any, words: str, tmp_path: Path) -> None:
    state = checkpoint("gfl", "resnet50")
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"x.pth: .*{words}"):
        read_weights(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("name", ZOO)
def test_a_published_file_is_known_by_its_name(name: str) -> None:
    """Whatever the configuration inside it may say."""
    known = ZOO[name]
    places = {
        "r50": "resnet50",
        "r101": "resnet101",
        "x101-32x4d": "resnext101_32x4d",
        "x101-64x4d": "resnext101_64x4d",
    }
    backbone = places[known.model.partition("-")[2]]
    # a few keys of the real layout are enough to recognize a file
    state = {k: v for k, v in kept(known.model.partition("-")[0]).items() if not k.startswith("backbone.layer3.")}
    state |= {
        f"backbone.layer3.{i}.conv{j}.weight": torch.zeros(1)
        for i in range(6 if backbone == "resnet50" else 23)
        for j in (1, 3)
    }
    if "x101" in known.model:
        state["backbone.layer1.0.conv2.weight"] = torch.zeros(128 if "32x4d" in known.model else 256, 4, 3, 3)
    found = dense_state({"meta": {"config": CONFIG_3}, "state_dict": state}, name)
    assert found is not None
    section = found.section
    assert (section["name"], section["backbone"]) == (known.model, backbone)
    assert known.keys.items() <= section.items()
    assert (section["style"] == "caffe") == section["bgr"] == ("caffe" in name or "auto_assign" in name)
    assert section["mean"] == (123.675, 116.28, 103.53) or section["mean"][0] < section["mean"][2]
    if known.model.startswith("fcos"):
        assert section["norm_on_bbox"] == section["conv_bias"] == ("normbbox" in name)
    assert parse_student(section).config.model_dump()["mean"] == section["mean"]


def test_every_r50_and_r101_has_a_file_behind_its_name() -> None:
    both = {f"{family}-{depth}" for family in ("fcos", "gfl", "atss", "retinanet") for depth in ("r50", "r101")}
    both |= {"reppoints-r50", "reppoints-r101", "reppoints-x101-32x4d"}
    assert set(AT_COCO) == both | {"retinanet-x101-32x4d", "retinanet-x101-64x4d", "autoassign-r50", "ddod-r50"}
    for model, name in AT_COCO.items():
        assert ZOO[name].model == model
        assert ZOO[name].ap == max(known.ap for known in ZOO.values() if known.model == model)
        published = PUBLISHED[model]
        assert re.fullmatch(r"[0-9a-f]{8}", published.sha256 or "")
        assert name.endswith(f"-{published.sha256}.pth")


def test_a_student_from_a_published_name_is_built_as_the_file_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    student = resolve(student="fcos-r101@coco").student
    assert student.weights == "fcos-r101@coco"
    keys = student.config.model_dump()
    assert (keys["style"], keys["bgr"], keys["norm_on_bbox"], keys["conv_bias"]) == ("caffe", True, False, False)
    assert resolve(student="gfl-r50@coco").student.config.model_dump()["style"] == "pytorch"
    assert resolve(student="fcos-r50").student.config.model_dump()["style"] == "pytorch"


def test_a_download_is_checked_against_the_digest_in_its_name(tmp_path: Path) -> None:
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    for name, right in ((f"a-{digest[:8]}.pth", True), ("b-00000000.pth", False)):
        (tmp_path / name).write_bytes(content)
        published = Published("http://127.0.0.1:9/", name, None, name[-12:-4])
        if right:
            assert fetch(published, tmp_path) == tmp_path / name
        else:
            with pytest.raises(UserError, match="has the sha256"):
                fetch(published, tmp_path)


def test_mobilenet_with_or_without_its_last_convolution(tmp_path: Path) -> None:
    """mmdetection keeps that layer in the file either way; the FPN's lateral tells whether a level reads it."""
    state = checkpoint("fcos", "mobilenetv2_100", last_conv=True)
    assert "backbone.conv2.bn.running_var" in state
    torch.save(state, tmp_path / "x.pth")
    opened = open_model(str(tmp_path / "x.pth"))
    assert opened.report.complete
    assert opened.detector.get_submodule("backbone").channels == (32, 96, 1280)
    narrower = checkpoint("fcos", "mobilenetv2_100")
    narrower |= {k: v for k, v in state.items() if k.startswith("backbone.conv2.")}
    torch.save(narrower, tmp_path / "y.pth")
    opened = open_model(str(tmp_path / "y.pth"))
    assert opened.report.complete
    assert opened.detector.get_submodule("backbone").channels == (32, 96, 320)


def test_atss_that_predicts_overlaps(tmp_path: Path) -> None:
    state = {k.replace("atss_centerness", "atss_iou"): v for k, v in checkpoint("atss", "resnet50").items()}
    torch.save(state, tmp_path / "x.pth")
    opened = open_model(str(tmp_path / "x.pth"))
    assert opened.report.complete
    assert opened.weights.section["quality"] == "iou"
    torch.save(checkpoint("atss", "resnet50"), tmp_path / "y.pth")
    assert read_weights(str(tmp_path / "y.pth")).section["quality"] == "centerness"


def test_a_retinanet_with_norm_and_extra_levels_on_the_output(tmp_path: Path) -> None:
    """As some users configure it; the weights tell but for the ReLU, which the configuration does."""
    torch.manual_seed(0)
    for number, keys in enumerate(({}, {"groups": 32, "extra_on": "output", "relu_before_last": True})):
        state, text = checkpoint("retinanet", "resnet50", **keys), "relu_before_extra_convs=True" if keys else ""
        torch.save({"meta": {"config": text}, "state_dict": state}, tmp_path / f"{number}.pth")
        opened = open_model(str(tmp_path / f"{number}.pth"))
        assert opened.report.complete
        section = opened.weights.section
        found = (section["groups"], section["extra_on"], section["relu_before_last"])
        assert found == ((32, "output", True) if keys else (None, "input", False))


def test_a_resnext_goes_by_its_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(checkpoint("retinanet", "resnext50_32x4d"), tmp_path / "x.pth")
    opened = open_model(str(tmp_path / "x.pth"))
    assert opened.report.complete
    assert (opened.name, opened.weights.section["backbone"]) == ("retinanet-r50", "resnext50_32x4d")


def test_anchors_that_do_not_fit_are_said(tmp_path: Path) -> None:
    state = dict(kept("retinanet"))
    state["bbox_head.retina_reg.weight"] = torch.zeros(12, 32, 3, 3)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: .*12 box numbers.*9 anchors; use one with three sizes"):
        read_weights(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("old", [False, True], ids=["today", "version 1"])
def test_deformable_stages_load(old: bool, tmp_path: Path) -> None:
    """RepPoints' teachers have them; the ResNet's number of stages is told by the weights."""
    torch.manual_seed(0)
    state = checkpoint("reppoints", "resnext50_32x4d", deformable_stages=2)
    assert {k.split(".")[1] for k in state if ".conv2.conv_offset." in k} == {"layer3", "layer4"}
    named = {k.replace(".conv2.conv_offset.", ".conv2_offset.") if old else k: v for k, v in state.items()}
    torch.save(named, tmp_path / "x.pth")
    opened = open_model(str(tmp_path / "x.pth"))
    assert opened.report.complete
    assert opened.weights.section["deformable_stages"] == 2
    own = opened.detector.state_dict()
    assert all(torch.equal(own[our_key(k)], v) for k, v in state.items())


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        ("backbone.layer4.0.conv2.conv_offset.weight", (27, 512, 3, 3), "modulated or in groups"),
        ("backbone.layer2.0.conv2.conv_offset.weight", (18, 128, 3, 3), r"stages \[2\] alone"),
        ("neck.fpn_convs.0.conv.conv_offset.weight", (18, 32, 3, 3), "where no REPPOINTS of this package has one"),
        ("neck.lateral_convs.0.gn.weight", None, "group norm in only one of FPN and head"),
    ],
)
def test_what_of_reppoints_is_not_supported_is_said(
    key: str, shape: tuple[int, ...] | None, words: str, tmp_path: Path
) -> None:
    state = dict(kept("reppoints"))
    if shape is None:
        del state[key]
    else:
        state[key] = torch.zeros(shape)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"x.pth: .*{words}"):
        read_weights(str(tmp_path / "x.pth"))


def test_reppoints_as_first_published(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(checkpoint("reppoints", "resnet50", groups=None), tmp_path / "x.pth")
    opened = open_model(str(tmp_path / "x.pth"))
    assert opened.report.complete
    assert opened.weights.section["groups"] is None


def test_what_belongs_to_a_run_is_not_loaded_as_weights(tmp_path: Path) -> None:
    """The positives that DDOD has counted are those of the run that counted them."""
    keys = {"backbone": "resnet18", "frozen_stages": 0, "norm_eval": True}
    first, second = (DETECTORS["ddod"](DETECTORS["ddod"].Config(**keys), ["cat"]) for _ in range(2))  # type: ignore[call-arg]
    first.get_submodule("head.positives").counts.fill_(7)  # type: ignore[operator, union-attr]
    report = load_into(second, first.state_dict(), allow_class_mismatch=False)
    assert report.complete
    assert not second.state_dict()["head.positives.counts"].any()
    assert inherit_from(first, second)
    assert not second.state_dict()["head.positives.counts"].any()


def test_other_files_are_none_of_these() -> None:
    assert dense_state({"state_dict": {"bbox_head.retina_cls.weight": torch.zeros(1)}}) is None
    assert dense_state({"model": 3}) is None
