"""Checkpoint files, official layouts, and loading with every disagreement reported."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from torch import Tensor

from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import read_yaml
from yoloxkd.errors import UserError
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.nn.weights.load import PUBLISHED, from_mmdetection, load_checkpoint_file, load_into, official_state

SIZES = ["nano", "tiny", "s", "m", "l", "x"]


def network(size: str, classes: int = 3, device: str = "cpu") -> YOLOX:
    keys = read_yaml(cfg_folder() / "models" / f"yolox-{size}.yaml")
    keys.pop("family")
    with torch.device(device):
        return YOLOX(YOLOX.Config(**keys), [f"class{i}" for i in range(classes)])


def to_mmdetection(key: str) -> str:
    """The other direction, written out for the parts of a YOLOX: what mmdetection calls each of our tensors."""
    key = key.replace("head.cls_convs", "bbox_head.multi_level_cls_convs")
    key = key.replace("head.reg_convs", "bbox_head.multi_level_reg_convs")
    for name in ("cls", "reg", "obj"):
        key = key.replace(f"head.{name}_preds", f"bbox_head.multi_level_conv_{name}")
    key = key.replace("head.stems", "neck.out_convs")
    csp = any(part in key for part in (".C3_", "dark2.1", "dark3.1", "dark4.1", "dark5.2"))
    if csp and ".m." not in key:
        for ours, theirs in (("conv1.", "main_conv."), ("conv2.", "short_conv."), ("conv3.", "final_conv.")):
            key = key.replace(ours, theirs)
    key = key.replace(".m.", ".blocks.").replace("dconv.", "depthwise_conv.").replace("pconv.", "pointwise_conv.")
    for ours, theirs in (
        ("backbone.backbone.dark2", "backbone.stage1"),
        ("backbone.backbone.dark3", "backbone.stage2"),
        ("backbone.backbone.dark4", "backbone.stage3"),
        ("backbone.backbone.dark5", "backbone.stage4"),
        ("backbone.backbone.stem", "backbone.stem"),
        ("backbone.lateral_conv0", "neck.reduce_layers.0"),
        ("backbone.reduce_conv1", "neck.reduce_layers.1"),
        ("backbone.C3_p4", "neck.top_down_blocks.0"),
        ("backbone.C3_p3", "neck.top_down_blocks.1"),
        ("backbone.bu_conv2", "neck.downsamples.0"),
        ("backbone.bu_conv1", "neck.downsamples.1"),
        ("backbone.C3_n3", "neck.bottom_up_blocks.0"),
        ("backbone.C3_n4", "neck.bottom_up_blocks.1"),
    ):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


# files


def test_a_checkpoint_round_trips(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "x.pth")
    raw = load_checkpoint_file(tmp_path / "x.pth")
    assert raw["epoch"] == 3
    assert torch.equal(raw["model"]["a"], torch.ones(2))


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_numpy_numbers_beside_the_weights_are_read(tmp_path: Path, module: bytes) -> None:
    torch.save({"model": {}, "best_ap": np.float64(0.4), "n": np.int64(2)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "x.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
                content = content.replace(b"c" + written + b"\n", b"c" + module + b"\n")
            old.writestr(name, content)
    raw = load_checkpoint_file(tmp_path / "x.pth")
    assert (raw["best_ap"], raw["n"]) == (0.4, 2)


class Foreign:
    pass


def absent(path: Path) -> None:
    path.unlink(missing_ok=True)


FAULTS: dict[str, tuple[Any, str]] = {
    "absent": (absent, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": (lambda path: path.write_text("epoch 1\n"), "is a text file"),
    "image": (lambda path: path.write_bytes(b"\x89PNG\r\n" + bytes(300)), "is an image"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(print)), "objects besides tensors|not a PyTorch checkpoint"),
    "foreign": (lambda path: torch.save({"model": Foreign()}, path), r"objects besides tensors \(.*Foreign\)"),
    "list": (lambda path: torch.save([1, 2], path), "holds a list"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bad_file_is_one_sentence(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    make(tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint_file(tmp_path / "x.pth")
    assert "x.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_one_sentence(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1000)}}, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint_file(tmp_path / "x.pth")


# official layouts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 1}], ids=["bare", "wrapped"])
def test_megvii_layout_and_architecture(size: str, wrap: Any) -> None:
    state = network(size, 5, "meta").state_dict()
    found = official_state(wrap(state))
    assert found is not None
    assert (found.source, found.num_classes, found.architecture) == ("megvii", 5, f"yolox-{size}")
    assert found.state.keys() == state.keys()


@pytest.mark.parametrize("size", ["nano", "s"])
def test_mmdetection_layout(size: str) -> None:
    model = network(size, 5)
    theirs: dict[str, Tensor] = {to_mmdetection(k): v for k, v in model.state_dict().items()}
    assert len(theirs) == len(model.state_dict())
    assert not any(key.startswith(("head.", "backbone.backbone.")) for key in theirs)
    averaged = {"ema_" + k.replace(".", "_"): torch.zeros_like(v) for k, v in theirs.items()}
    found = official_state({"meta": {"CLASSES": ("a",)}, "state_dict": theirs | averaged})
    assert found is not None
    assert (found.source, found.num_classes, found.architecture) == ("mmdetection", 5, f"yolox-{size}")
    other = network(size, 5)
    assert load_into(other, found.state, allow_class_mismatch=False).complete
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.stem.conv.conv.weight", "backbone.backbone.stem.conv.conv.weight"),
        ("backbone.stage1.0.conv.weight", "backbone.backbone.dark2.0.conv.weight"),
        ("backbone.stage4.1.conv2.bn.bias", "backbone.backbone.dark5.1.conv2.bn.bias"),
        ("backbone.stage4.2.short_conv.bn.bias", "backbone.backbone.dark5.2.conv2.bn.bias"),
        (
            "backbone.stage2.1.blocks.2.conv2.pointwise_conv.bn.running_var",
            "backbone.backbone.dark3.1.m.2.conv2.pconv.bn.running_var",
        ),
        ("neck.top_down_blocks.1.main_conv.conv.weight", "backbone.C3_p3.conv1.conv.weight"),
        ("neck.downsamples.0.depthwise_conv.conv.weight", "backbone.bu_conv2.dconv.conv.weight"),
        ("bbox_head.multi_level_conv_obj.2.bias", "head.obj_preds.2.bias"),
        ("data_preprocessor.mean", "data_preprocessor.mean"),
    ],
)
def test_mmdetection_names(theirs: str, ours: str) -> None:
    assert from_mmdetection(theirs) == ours


def test_a_size_without_a_name_is_recognized_but_not_named() -> None:
    odd = YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=False), ["a"])
    found = official_state(odd.state_dict())
    assert found is not None
    assert found.architecture is None


@pytest.mark.parametrize("raw", [{}, {"model": 3}, {"state_dict": {"fc.weight": torch.ones(1)}}, {"epoch": 1}])
def test_anything_else_is_not_official(raw: dict[str, Any]) -> None:
    assert official_state(raw) is None


# loading


def test_the_official_nano_loads_completely(nano_weights: Path) -> None:
    found = official_state(load_checkpoint_file(nano_weights))
    assert found is not None
    assert (found.source, found.num_classes, found.architecture) == ("megvii", len(COCO_NAMES), "yolox-nano")
    model = network("nano", found.num_classes)
    model.load_state_dict(found.state, strict=True)
    report = load_into(model, found.state, allow_class_mismatch=False)
    assert report.complete
    assert report.loaded == report.total == 912159
    assert report.share == 1


def test_other_classes_keep_everything_but_the_class_predictors() -> None:
    source, model = network("nano", 5), network("nano", 3)
    before = model.state_dict()["head.cls_preds.0.weight"].clone()
    report = load_into(model, source.state_dict(), allow_class_mismatch=True)
    predictors = [f"head.cls_preds.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert report.class_predictors_skipped
    assert sorted(report.mismatched) == sorted(predictors)
    assert report.loaded == report.total - sum(model.state_dict()[key].numel() for key in predictors)
    assert "class predictors" in report.describe()
    state = model.state_dict()
    assert torch.equal(state["head.cls_preds.0.weight"], before)
    assert all(torch.equal(v, state[k]) for k, v in source.state_dict().items() if k not in predictors)


def test_equal_numbers_of_other_classes_can_be_kept_out() -> None:
    source, model = network("nano", 3), network("nano", 3)
    before = model.state_dict()["head.cls_preds.1.weight"].clone()
    report = load_into(model, source.state_dict(), allow_class_mismatch=True, keep_classes=False)
    assert report.class_predictors_skipped
    assert torch.equal(model.state_dict()["head.cls_preds.1.weight"], before)


def test_other_classes_can_be_refused() -> None:
    with pytest.raises(UserError, match="5 classes and the model 3"):
        load_into(network("nano", 3), network("nano", 5).state_dict(), allow_class_mismatch=False)


def test_missing_and_unexpected_keys_are_reported() -> None:
    model = network("nano")
    state = dict(model.state_dict())
    removed = state.pop("head.reg_preds.1.bias")
    state["head.extra.weight"] = torch.ones(3)
    report = load_into(model, state, allow_class_mismatch=False)
    assert report.missing == ["head.reg_preds.1.bias"]
    assert report.unexpected == ["head.extra.weight"]
    assert not report.complete
    assert report.loaded == report.total - removed.numel()
    assert "head.reg_preds.1.bias" in report.describe()
    assert "head.extra.weight" in report.describe()


@pytest.mark.parametrize(("source", "target"), [("tiny", "nano"), ("nano", "tiny"), ("tiny", "s"), ("m", "s")])
def test_another_architecture_is_refused_by_its_first_keys(source: str, target: str) -> None:
    model = network(target)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=r"another architecture.*backbone\.backbone\.stem\.conv\.conv\.weight"):
        load_into(model, network(source, device="meta").state_dict(), allow_class_mismatch=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_less_than_half_a_model_is_refused() -> None:
    model = network("nano")
    stem = {k: v for k, v in model.state_dict().items() if "stem" in k}
    with pytest.raises(UserError, match="fits only"):
        load_into(model, stem, allow_class_mismatch=True)


def test_published_table() -> None:
    assert sorted(n for n in PUBLISHED if n.startswith("yolox")) == sorted(f"yolox-{size}" for size in SIZES)
    for published in PUBLISHED.values():
        assert unquote(published.url).endswith("/" + published.filename)
    assert len(COCO_NAMES) == len(set(COCO_NAMES)) == 80
