"""Cascade R-CNN (Cai and Vasconcelos 2018): three box heads, each on the boxes of the one before."""

from __future__ import annotations

from pydantic import Field

from yoloxkd.nn.two_stage.box_head import Four, StageRule
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN, FasterRCNNConfig
from yoloxkd.nn.two_stage.rpn import RPNRule

STAGES: tuple[tuple[float, Four, float], ...] = (
    (0.5, (0.1, 0.1, 0.2, 0.2), 1.0),
    (0.6, (0.05, 0.05, 0.1, 0.1), 0.5),
    (0.7, (0.033, 0.033, 0.067, 0.067), 0.25),
)
"""IoU, standard deviations of the box code, and weight of the losses, of each stage (section 4 of the paper)."""


class CascadeRCNNConfig(FasterRCNNConfig):
    """Keys of Cascade R-CNN."""

    train_proposals: int = Field(2000, ge=1, description="in training: proposals of an image")


class CascadeRCNN(FasterRCNN):
    """Cascade R-CNN on any timm backbone: boxes alike for all classes, scores by the mean of the stages' logits."""

    Config = CascadeRCNNConfig
    family = "cascade-rcnn"
    class_predictors = tuple(f"roi_head.bbox_head.{stage}.fc_cls." for stage in range(len(STAGES)))

    def stage_rules(self) -> tuple[StageRule, ...]:
        samples = self.cfg.region_samples
        return tuple(
            StageRule(iou, stds, weight, samples=samples, agnostic=True, beta=1.0) for iou, stds, weight in STAGES
        )

    def rpn_rule(self) -> RPNRule:
        return RPNRule(samples=self.cfg.anchor_samples, beta=1 / 9, inside=True)
