"""Detectors: the table of families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yoloxkd.table import Table

if TYPE_CHECKING:
    from yoloxkd.nn.detector import Detector

DETECTORS: Table[type[Detector]] = Table(
    "model family",
    {
        "yolox": "yoloxkd.nn.dense.yolox:YOLOX",
        "fcos": "yoloxkd.nn.dense.fcos:FCOS",
        "gfl": "yoloxkd.nn.dense.gfl:GFL",
        "atss": "yoloxkd.nn.dense.atss:ATSS",
        "retinanet": "yoloxkd.nn.dense.retinanet:RetinaNet",
        "autoassign": "yoloxkd.nn.dense.autoassign:AutoAssign",
        "ddod": "yoloxkd.nn.dense.ddod:DDOD",
        "reppoints": "yoloxkd.nn.dense.reppoints:RepPoints",
        "faster-rcnn": "yoloxkd.nn.two_stage.faster_rcnn:FasterRCNN",
        "cascade-rcnn": "yoloxkd.nn.two_stage.cascade_rcnn:CascadeRCNN",
        "mask-rcnn": "yoloxkd.nn.two_stage.mask_rcnn:MaskRCNN",
        "cascade-mask-rcnn": "yoloxkd.nn.two_stage.mask_rcnn:CascadeMaskRCNN",
        "solo": "yoloxkd.nn.solo.solo:SOLO",
    },
)
"""Family, the first part of a model's name -> its class."""
