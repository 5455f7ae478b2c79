"""Every detector in two stages keeps their contract."""

from __future__ import annotations

from tests.nn.two_stage.contract import TwoStageContract
from yoloxkd.nn.two_stage.cascade_rcnn import CascadeRCNN
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN


class TestFasterRCNN(TwoStageContract):
    kind = FasterRCNN


class TestCascadeRCNN(TwoStageContract):
    kind = CascadeRCNN
