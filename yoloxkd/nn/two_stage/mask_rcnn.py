"""Mask R-CNN (He et al. 2017), and its cascade (Cai and Vasconcelos 2019): a mask for every detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from yoloxkd.config.strict import Strict
from yoloxkd.nn.two_stage.box_head import StageRule
from yoloxkd.nn.two_stage.cascade_rcnn import STAGES, CascadeRCNN, CascadeRCNNConfig
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN, FasterRCNNConfig
from yoloxkd.nn.two_stage.mask_roi_head import MaskRoIHead
from yoloxkd.ops.nms import NMS
from yoloxkd.soft_masks import BoxMasks
from yoloxkd.types import Detections, RoIOutput


class _MaskKeys(Strict):
    mask_hidden: int = Field(256, ge=1, le=4096, description="channels of a mask head")
    mask_convs: int = Field(4, ge=1, le=64, description="3x3 convolutions of a mask head")


class MaskRCNNConfig(FasterRCNNConfig, _MaskKeys):
    """Keys of Mask R-CNN."""


class CascadeMaskRCNNConfig(CascadeRCNNConfig, _MaskKeys):
    """Keys of Cascade Mask R-CNN."""


class MaskDetector(FasterRCNN):
    """What a mask head adds to a two-stage detector."""

    cfg: MaskRCNNConfig | CascadeMaskRCNNConfig  # type: ignore[assignment]
    roi_head: MaskRoIHead

    def __init__(self, cfg: MaskRCNNConfig | CascadeMaskRCNNConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.spec = replace(self.spec, masks=True)

    def build_roi_head(self, classes: int) -> MaskRoIHead:
        cfg = self.cfg
        return MaskRoIHead(
            cfg.channels,
            classes,
            self.stage_rules(),
            form=cfg.head_form(),
            pooling=cfg.pooling(),
            strides=self.strides,
            mask_hidden=cfg.mask_hidden,
            mask_convs=cfg.mask_convs,
        )

    def masks(self, out: RoIOutput, boxes: Tensor, labels: Tensor) -> Tensor:
        """(B, D, s, s) probability of the masks of boxes (B, D, 4) px with classes (B, D), in the raster of each box."""
        return self.roi_head.mask_probability(out.features, boxes, labels)

    def detect(self, out: RoIOutput, nms: NMS) -> list[Detections]:
        """The detections of each image, in px of the network input, with `soft_masks`."""
        return self.masked(out, super().detect(out, nms))

    @torch.no_grad()
    def masked(self, out: RoIOutput, detections: list[Detections]) -> list[Detections]:
        """The detections of each image with `soft_masks`."""
        boxes = pad_sequence([torch.from_numpy(one.boxes) for one in detections], batch_first=True).to(out.proposals)
        labels = pad_sequence([torch.from_numpy(one.labels) for one in detections], batch_first=True).to(
            out.proposals.device
        )
        masks = self.masks(out, boxes, labels).float().cpu().numpy()
        for one, mask in zip(detections, masks, strict=True):
            one.soft_masks = BoxMasks(mask[: len(one)])
        return detections


class MaskRCNN(MaskDetector):
    """Mask R-CNN on any timm backbone."""

    Config = MaskRCNNConfig
    family = "mask-rcnn"
    class_predictors = (*FasterRCNN.class_predictors, "roi_head.mask_head.0.conv_logits.")

    def stage_rules(self) -> tuple[StageRule, ...]:
        return (StageRule(samples=self.cfg.region_samples, low_quality=True),)


class CascadeMaskRCNN(MaskDetector, CascadeRCNN):
    """Cascade Mask R-CNN on any timm backbone; a detection's mask is the mean of the stages' masks."""

    Config = CascadeMaskRCNNConfig
    family = "cascade-mask-rcnn"
    class_predictors = (
        *CascadeRCNN.class_predictors,
        *(f"roi_head.mask_head.{stage}.conv_logits." for stage in range(len(STAGES))),
    )
