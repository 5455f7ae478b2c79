"""Every family of detectors keeps the contract."""

from __future__ import annotations

import torch

from tests.nn.contract import FREE_SHAPES, NMS_OF_FREE_SHAPES, DetectorContract
from tests.nn.fpn import SHALLOW, narrow
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.dense.atss import ATSS
from yoloxkd.nn.dense.autoassign import AutoAssign
from yoloxkd.nn.dense.ddod import DDOD
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.dense.fcos import FCOS
from yoloxkd.nn.dense.gfl import GFL
from yoloxkd.nn.dense.reppoints import RepPoints
from yoloxkd.nn.dense.retinanet import RetinaNet
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.nn.solo.solo import SOLO
from yoloxkd.nn.two_stage.cascade_rcnn import CascadeRCNN
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN
from yoloxkd.nn.two_stage.mask_rcnn import CascadeMaskRCNN, MaskRCNN


class TestYOLOX(DetectorContract):
    exports = ((True, True), (True, False), (False, False))
    """Free shapes without NMS: `tests/cli/test_commands.py`."""

    def build(self, names: list[str]) -> DenseDetector:
        return YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=True), names)


class TestFCOS(DetectorContract):
    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(FCOS, names)
        return model


class TestPlainFCOS(DetectorContract):
    """FCOS as first published."""

    exports = ((False, False),)

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(
            FCOS,
            names,
            center_sampling=False,
            norm_on_bbox=False,
            centerness_on_reg=False,
            conv_bias=False,
            box_loss="iou",
        )
        return model


class TestGFL(DetectorContract):
    exports = NMS_OF_FREE_SHAPES

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(GFL, names, backbone=SHALLOW)
        return model


class TestATSS(DetectorContract):
    exports = ((False, False),)  # GFL has the same head, with free shapes and NMS

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(ATSS, names, backbone=SHALLOW)
        return model


class TestDDOD(DetectorContract):
    exports = ((False, False),)  # RepPoints has the same deformable convolutions, with free shapes

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(DDOD, names, backbone=SHALLOW)
        return model


class TestRepPoints(DetectorContract):
    exports = FREE_SHAPES

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(RepPoints, names, backbone=SHALLOW)
        return model


class TestRetinaNet(DetectorContract):
    exports = NMS_OF_FREE_SHAPES

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(RetinaNet, names)
        return model


class TestAutoAssign(DetectorContract):
    exports = ((False, False),)  # FCOS has the same head, with free shapes

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(AutoAssign, names, backbone=SHALLOW)
        return model


def test_no_family_is_left_out() -> None:
    dense = {YOLOX, FCOS, GFL, ATSS, RetinaNet, AutoAssign, DDOD, RepPoints}
    assert dense | {FasterRCNN, CascadeRCNN, MaskRCNN, CascadeMaskRCNN, SOLO} == set(DETECTORS.values())
    assert {name: kind.family for name, kind in DETECTORS.items()} == {name: name for name in DETECTORS}


def test_a_group_of_one_value_is_its_bias() -> None:
    """A small image's coarsest map has one cell; with as many groups as channels each group is that one number."""
    model = narrow(GFL, ["cat"], channels=8, groups=8).eval()
    assert model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).boxes.isfinite().all()
