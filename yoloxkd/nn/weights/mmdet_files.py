"""Published mmdetection checkpoints that can be loaded, and their input conventions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_RGB: dict[str, Any] = {
    "style": "pytorch", "bgr": False, "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)
}  # fmt: skip
_CAFFE: dict[str, Any] = {"style": "caffe", "bgr": True, "std": (1.0, 1.0, 1.0)}
_DETECTRON = _CAFFE | {"mean": (102.9801, 115.9465, 122.7717)}
_DETECTRON2 = _CAFFE | {"mean": (103.53, 116.28, 123.675)}
_PLAIN = {
    "conv_bias": False, "center_sampling": False, "norm_on_bbox": False, "centerness_on_reg": False, "box_loss": "iou",
}  # fmt: skip
_IMPROVED = {
    "conv_bias": True, "center_sampling": True, "norm_on_bbox": True, "centerness_on_reg": True, "box_loss": "giou",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ZooFile:
    """One published file.

    model   the name of its architecture here; folder: that of its configuration in the zoo
    ap      its published AP on COCO val2017, percent
    keys    of the detector's Config: style of the ResNet, color order (`bgr`), mean and std in that order, FCOS's variant
    """

    model: str
    folder: str
    ap: float
    keys: dict[str, Any]


ZOO: dict[str, ZooFile] = {
    "fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth": ZooFile(
        "fcos-r50", "fcos_r50_caffe_fpn_gn-head_1x_coco", 36.6, _DETECTRON | _PLAIN
    ),
    "fcos_r50_caffe_fpn_gn-head_mstrain_640-800_2x_coco-d92ceeea.pth": ZooFile(
        "fcos-r50", "fcos_r50_caffe_fpn_gn-head_mstrain_640-800_2x_coco", 38.5, _DETECTRON | _PLAIN
    ),
    "fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco-0a0d75a8.pth": ZooFile(
        "fcos-r50",
        "fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco",
        38.7,
        _DETECTRON2 | _IMPROVED,
    ),
    "fcos_r101_caffe_fpn_gn-head_1x_coco-0e37b982.pth": ZooFile(
        "fcos-r101", "fcos_r101_caffe_fpn_gn-head_1x_coco", 39.1, _DETECTRON | _PLAIN
    ),
    "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth": ZooFile(
        "fcos-r101", "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco", 40.8, _DETECTRON | _PLAIN
    ),
    "gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth": ZooFile("gfl-r50", "gfl_r50_fpn_1x_coco", 40.2, _RGB),
    "gfl_r50_fpn_mstrain_2x_coco_20200629_213802-37bb1edc.pth": ZooFile(
        "gfl-r50", "gfl_r50_fpn_mstrain_2x_coco", 42.9, _RGB
    ),
    "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth": ZooFile(
        "gfl-r101", "gfl_r101_fpn_mstrain_2x_coco", 44.7, _RGB
    ),
    "atss_r50_fpn_1x_coco_20200209-985f7bd0.pth": ZooFile("atss-r50", "atss_r50_fpn_1x_coco", 39.4, _RGB),
    "atss_r101_fpn_1x_20200825-dfcadd6f.pth": ZooFile("atss-r101", "atss_r101_fpn_1x_coco", 41.5, _RGB),
}
"""File name -> what it is. A name ends with the first eight hexadecimal digits of the file's SHA-256."""

AT_COCO = {
    "fcos-r50": "fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco-0a0d75a8.pth",
    "fcos-r101": "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth",
    "gfl-r50": "gfl_r50_fpn_mstrain_2x_coco_20200629_213802-37bb1edc.pth",
    "gfl-r101": "gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
    "atss-r50": "atss_r50_fpn_1x_coco_20200209-985f7bd0.pth",
    "atss-r101": "atss_r101_fpn_1x_20200825-dfcadd6f.pth",
}
"""Architecture -> the file behind `NAME@coco`: the most accurate one there is."""
