"""Files of torchvision's and mmdetection's R-CNNs open as detectors; torchvision's own model detects the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import BatchNorm2d
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from tests.nn.contract import NAMES
from tests.nn.test_mmdet_weights import their_key
from tests.nn.two_stage.contract import MASK_KEYS, narrow_two_stage
from yoloxkd import Detector
from yoloxkd.assembly.models import open_model, read_weights
from yoloxkd.errors import UserError
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.two_stage.key_map import NOT_COCO, mmdetection_two_stage, torchvision_two_stage
from yoloxkd.nn.weights.published import PUBLISHED
from yoloxkd.nn.weights.two_stage_files import TORCHVISION_TWO_STAGE
from yoloxkd.ops.nms import NMS
from yoloxkd.soft_masks import BoxMasks

HEIGHT, WIDTH = 128, 160
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def _same_images() -> None:
    """Whatever ran before: of other images two scores may be alike to the last digit, and either may come first."""
    torch.manual_seed(0)


def on_resnet18(**keys: Any) -> Any:
    """The parts of maskrcnn_resnet50_fpn on a smaller network."""
    return detection.MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=BatchNorm2d), **keys
    )


def random_reference(build: Callable[..., Any], images: Tensor, **keys: Any) -> Any:
    """torchvision's detector with random weights, whose norms have statistics of their own, or maps grow without bound."""
    torch.manual_seed(0)
    untrained = {} if build is on_resnet18 else {"weights": None, "weights_backbone": None}
    model = build(
        num_classes=len(NAMES) + 1, min_size=HEIGHT, box_detections_per_img=20,
        **untrained, **({"max_size": WIDTH, "rpn_post_nms_top_n_test": 60} | keys),
    )  # fmt: skip
    norms = [m for m in model.modules() if isinstance(m, BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    prepared = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        model.backbone.train()(prepared)
        model.eval()
        model.rpn.head.cls_logits.weight *= 5  # logits of an untrained network hardly differ
        model.roi_heads.box_predictor.cls_score.weight *= 10
        model.roi_heads.box_predictor.bbox_pred.weight *= 4
    return model


@pytest.mark.slow
def test_on_mobilenetv3_it_detects_what_torchvision_detects(tmp_path: Path) -> None:
    """Two maps of stride 32, proposals from both, regions from the first; proposals below a score are left out."""
    images = torch.rand(2, 3, HEIGHT, 192)
    reference = random_reference(
        detection.fasterrcnn_mobilenet_v3_large_fpn, images, max_size=192, rpn_score_thresh=0.5,
        rpn_post_nms_top_n_test=1000,
    )  # fmt: skip
    torch.save(reference.state_dict(), tmp_path / "faster.pth")
    opened = open_model(str(tmp_path / "faster.pth"))
    assert (opened.weights.kind, opened.name) == ("torchvision", "faster-rcnn-mobilenetv3@torchvision")
    assert opened.report.complete
    model = opened.detector.double()
    assert model.cfg.proposal_score == 0.05
    model.cfg.proposal_score = 0.5
    reference, images = reference.double(), images.double()
    with torch.no_grad():
        expected = reference(list(images))
        out = model(images * 255)
    assert (out.rpn.cls_logits < 0).any()  # some proposals are left out
    for ours, theirs in zip(model.detect(out, NMS(conf=0.05, iou=0.5, max_det=20)), expected, strict=True):
        assert len(ours.boxes) == len(theirs["boxes"]) > 3
        torch.testing.assert_close(torch.from_numpy(ours.boxes), theirs["boxes"].float(), rtol=0, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(ours.scores), theirs["scores"].float(), rtol=1e-4, atol=0)
        assert (ours.labels == (theirs["labels"] - 1).numpy()).all()
    state = {k: v for k, v in reference.state_dict().items() if not k.endswith("num_batches_tracked")}
    small = torchvision_two_stage({"model": state}, "907ea3f9" + 56 * "0")  # frozen norms have no counter
    assert small is not None
    assert small.section["name"] == "faster-rcnn-mobilenetv3@torchvision-320"
    assert small.state.keys() == model.state_dict().keys()
    state["roi_heads.mask_predictor.mask_fcn_logits.weight"] = torch.zeros(len(NAMES) + 1, 8, 1, 1)
    with pytest.raises(UserError, match="a Mask R-CNN on MobileNetV3, which is not supported"):
        torchvision_two_stage(state)
    state["backbone.body.1.block.0.0.weight"] = torch.zeros(8, 1, 3, 3)
    with pytest.raises(UserError, match="backbone other than ResNet and MobileNetV3-Large"):
        torchvision_two_stage(state)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["", "-v2"])
def test_it_detects_what_torchvision_detects(version: str, tmp_path: Path) -> None:
    """Boxes, scores, classes and masks, these in the raster of their boxes; the image has a size that torchvision's own preparation leaves alone."""
    images = torch.rand(1, 3, HEIGHT, WIDTH)
    reference = random_reference(detection.maskrcnn_resnet50_fpn_v2 if version else on_resnet18, images)
    state = {k: v for k, v in reference.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "mask.pth")
    opened = open_model(str(tmp_path / "mask.pth"))
    assert (opened.weights.kind, opened.name) == ("torchvision", f"mask-rcnn-r50@torchvision{version}")
    assert opened.report.complete
    faster = torchvision_two_stage({"model": {k: v for k, v in state.items() if ".mask_" not in k}})
    assert faster is not None
    assert faster.section["name"] == f"faster-rcnn-r50@torchvision{version}"
    model = opened.detector.double()
    model.cfg.test_proposals = 60
    reference, images = reference.double(), images.double()
    logits: list[Tensor] = []
    reference.roi_heads.mask_predictor.register_forward_hook(lambda *call: logits.append(call[2]))
    with torch.no_grad():
        expected = reference(list(images))
        found = model.detect(model(images * 255), NMS(conf=0.05, iou=0.5, max_det=20))
    probability = iter(logits[0].sigmoid())
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours.boxes) == len(theirs["boxes"]) > 10
        torch.testing.assert_close(torch.from_numpy(ours.boxes), theirs["boxes"].float(), rtol=0, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(ours.scores), theirs["scores"].float(), rtol=1e-4, atol=0)
        assert (ours.labels == (theirs["labels"] - 1).numpy()).all()
        assert isinstance(ours.soft_masks, BoxMasks)
        own = torch.stack([next(probability)[label] for label in theirs["labels"].tolist()])
        torch.testing.assert_close(torch.from_numpy(ours.soft_masks.probability), own.float(), rtol=1e-3, atol=1e-4)


def test_a_coco_file_keeps_the_rows_of_its_80_categories() -> None:
    state = {
        "rpn.head.conv.weight": torch.zeros(4, 4, 3, 3), "rpn.head.conv.bias": torch.zeros(4),
        "rpn.head.cls_logits.weight": torch.zeros(3, 4, 1, 1),
        "roi_heads.box_predictor.cls_score.weight": torch.arange(91.0)[:, None],
        "roi_heads.box_predictor.bbox_pred.bias": torch.arange(91.0).repeat_interleave(4),
        "roi_heads.mask_predictor.mask_fcn_logits.weight": torch.arange(91.0)[:, None],
        "roi_heads.mask_head.mask_fcn1.weight": torch.zeros(4, 4, 3, 3),
        "roi_heads.box_head.fc6.weight": torch.zeros(4, 4),
        "backbone.body.layer1.0.conv2.weight": torch.zeros(64, 64, 3, 3),
        **{f"backbone.body.layer3.{i}.conv{j}.weight": torch.zeros(1) for i in range(6) for j in (1, 3)},
        **{f"backbone.fpn.{part}_blocks.{i}.weight": torch.zeros(4, 4, 1, 1) for part in ("inner", "layer") for i in range(4)},
    }  # fmt: skip
    found = torchvision_two_stage({"model": state}, "bf2d0c1e" + 56 * "0")
    assert found is not None
    numbers = [i for i in range(1, 91) if i not in NOT_COCO]
    assert found.classes == len(numbers) == len(COCO_NAMES)
    assert found.state["roi_head.bbox_head.0.fc_cls.weight"][:, 0].tolist() == [*numbers, 0]
    assert found.state["roi_head.bbox_head.0.fc_reg.bias"].view(-1, 4)[:, 3].tolist() == numbers
    assert found.state["roi_head.mask_head.0.conv_logits.weight"][:, 0].tolist() == numbers
    assert {"rpn_head.rpn_conv.weight", "roi_head.mask_head.0.convs.0.conv.weight"} <= found.state.keys()
    assert (found.section["name"], found.section["norm_eps"]) == ("mask-rcnn-r50@torchvision", 0.0)
    other = torchvision_two_stage(state, 64 * "0")
    assert other is not None
    assert other.section["norm_eps"] is None
    state["rpn.head.cls_logits.weight"] = torch.zeros(15, 4, 1, 1)
    with pytest.raises(UserError, match="15 anchors a cell, which is not supported"):
        torchvision_two_stage(state)


def test_torchvisions_own_addresses() -> None:
    weights = {
        "faster-rcnn-r50": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
        "faster-rcnn-r50-v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
        "faster-rcnn-mobilenetv3": detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
        "faster-rcnn-mobilenetv3-320": detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
        "mask-rcnn-r50": detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
        "mask-rcnn-r50-v2": detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    }
    assert {model + version for model, version in TORCHVISION_TWO_STAGE} == set(weights)
    for model, version in TORCHVISION_TWO_STAGE:
        assert PUBLISHED[f"{model}@torchvision{version}"].url == weights[model + version].url


@pytest.mark.parametrize("family", ["faster-rcnn", "cascade-rcnn", "mask-rcnn", "cascade-mask-rcnn"])
@pytest.mark.parametrize("version", [2, 3])
def test_mmdetections_files_open(family: str, version: int, tmp_path: Path) -> None:
    """A narrow MobileNetV2's cannot be told from a file, so the widths are those of the full one."""
    torch.manual_seed(0)
    kind = DETECTORS[family]
    model = narrow_two_stage(kind, NAMES, backbone="mobilenetv2_100")  # type: ignore[arg-type]
    single = "cascade" not in family
    state = {
        their_key(key.replace("_head.0.", "_head.") if single else key, mobile=True): value
        for key, value in model.state_dict().items()
    }
    meta: dict[str, Any] = {"CLASSES": tuple(NAMES)} if version == 2 else {"dataset_meta": {"classes": NAMES}}
    if version == 3:
        state["data_preprocessor.mean"] = torch.zeros(3, 1, 1)
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "epoch_12.pth")
    opened = open_model(str(tmp_path / "epoch_12.pth"))
    assert (opened.name, opened.weights.kind) == (f"{family}-mobilenetv2", "mmdetection")
    assert opened.report.complete
    assert opened.detector.names == NAMES
    for (key, ours), value in zip(opened.detector.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, value), key
    if model.spec.masks:
        assert {key: opened.weights.section[key] for key in MASK_KEYS} == MASK_KEYS
        image = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
        (found,) = Detector(str(tmp_path / "epoch_12.pth")).predict(image, conf=1e-3, imgsz=96)
        assert found.masks is not None
        assert found.masks.shape == (len(found), 80, 100)
        assert len(found) > 0


@pytest.mark.parametrize(
    ("file", "name", "backbone", "deformable"),
    [
        ("faster_rcnn_r50_fpn_1x_coco_20200130-047c8118.pth", "faster-rcnn-r50", "resnet50", 0),
        ("mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth", "mask-rcnn-r50", "resnet50", 0),
        ("cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth", "cascade-mask-rcnn-x101-32x4d", "resnext101_32x4d", 3),
        ("cascade_mask_rcnn_x101_64x4d_fpn_20e_coco_20200512_161033-bdb5126a.pth", "cascade-mask-rcnn-r50", "resnext101_64x4d", 0),
    ],
)  # fmt: skip
def test_published_files_find_their_network(file: str, name: str, backbone: str, deformable: int) -> None:
    """Names of tensors and shapes alone, without memory for them."""
    kind = DETECTORS[name.partition("-r50")[0].partition("-x101")[0]]
    keys = {"backbone": backbone, "deformable_stages": deformable, "frozen_stages": 1, "norm_eval": True}
    with torch.device("meta"):
        model = kind(kind.Config(backbone_weights="none", **keys), COCO_NAMES)  # type: ignore[arg-type]
    state = {
        their_key(key if "cascade" in name else key.replace("_head.0.", "_head."), mobile=False): value
        for key, value in model.state_dict().items()
    }
    found = mmdetection_two_stage({"meta": {"CLASSES": tuple(COCO_NAMES)}, "state_dict": state}, file)
    assert found is not None
    assert (found.section["name"], found.section["backbone"]) == (name, backbone)
    assert (found.section["deformable_stages"], found.section["style"], found.section["bgr"]) == (
        deformable,
        "pytorch",
        False,
    )
    assert {key: value.shape for key, value in found.state.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_what_mmdetection_has_and_this_package_has_not(tmp_path: Path) -> None:
    state = {
        "roi_head.bbox_head.0.fc_cls.weight": torch.zeros(4, 8),
        "roi_head.bbox_head.0.fc_reg.weight": torch.zeros(12, 8),
        "rpn_head.rpn_cls.weight": torch.zeros(3, 8, 1, 1),
        "backbone.layer1.0.conv2.weight": torch.zeros(64, 64, 3, 3),
        **{f"backbone.layer3.{i}.conv{j}.weight": torch.zeros(1) for i in range(6) for j in (1, 3)},
        **{f"neck.fpn_convs.{i}.conv.weight": torch.zeros(8, 8, 3, 3) for i in range(4)},
    }
    with pytest.raises(UserError, match="cascade has not three stages"):
        mmdetection_two_stage({"state_dict": state})
    state["backbone.layer4.0.conv2.conv_offset.weight"] = torch.zeros(27, 8, 3, 3)
    with pytest.raises(UserError, match="modulated or in groups"):
        mmdetection_two_stage({"state_dict": state})
    torch.save({"state_dict": {"roi_head.x": torch.zeros(1)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="not a checkpoint of a known detector"):
        read_weights(str(tmp_path / "x.pth"))
