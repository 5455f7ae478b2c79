"""ATSS as in the release of PGD keeps the contract too: overlaps for centerness, a MobileNetV2 with its last convolution."""

from __future__ import annotations

from tests.nn.contract import DetectorContract
from tests.nn.fpn import narrow
from yoloxkd.nn.dense.atss import ATSS
from yoloxkd.nn.dense.dense_detector import DenseDetector


class TestOverlapATSS(DetectorContract):
    test_export_parity = None  # type: ignore[assignment]  # the graph is ATSS's

    def build(self, names: list[str]) -> DenseDetector:
        model: DenseDetector = narrow(ATSS, names, quality="iou", last_conv=True)
        return model
