"""Faster R-CNN (Ren et al. 2015) on a feature pyramid (Lin et al. 2017): a network proposes regions, a head classifies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from yoloxkd.nn.detector import BoxCode, DetectorSpec
from yoloxkd.nn.necks.pooled_fpn import PooledFPN, with_pooled
from yoloxkd.nn.pyramid import PyramidConfig, build_backbone, build_coarse_backbone, start_backbone
from yoloxkd.nn.two_stage.box_head import HeadForm, StageRule
from yoloxkd.nn.two_stage.proposals import ProposalRule, propose
from yoloxkd.nn.two_stage.roi_detector import RoIDetector, RoIMatch
from yoloxkd.nn.two_stage.roi_head import STRIDES, Pooling, RoIHead, best_pairs
from yoloxkd.nn.two_stage.rpn import RPN, RPNRule, areas, assign_anchors, rpn_losses
from yoloxkd.nn.two_stage.rpn import STRIDES as RPN_STRIDES
from yoloxkd.nn.two_stage.sampling import Stream, random_keys
from yoloxkd.ops.constants import constant
from yoloxkd.types import Draw, Losses, RoIOutput, RoIStage, Tap, Targets

COARSE = (32,)
COARSE_LEVELS = (32, 32, 64)
COARSE_ANCHORS = (32.0, 64.0, 128.0, 256.0, 512.0)
"""Strides of the maps that regions are read from, and of those that proposals come from, and px of the sides of a cell's
anchors, where `coarse` is set (torchvision's fasterrcnn_mobilenet_v3_large_fpn)."""


class FasterRCNNConfig(PyramidConfig):
    """Keys of Faster R-CNN; the defaults are the published ones."""

    hidden: int = Field(1024, ge=1, le=65536, description="width of the second stage's fully connected layers")
    train_anchors: int = Field(2000, ge=1, description="in training: best anchors of a level, before NMS")
    test_anchors: int = Field(1000, ge=1, description="the same at test")
    train_proposals: int = Field(1000, ge=1, description="in training: proposals of an image")
    test_proposals: int = Field(1000, ge=1, description="the same at test")
    proposal_iou: float = Field(0.7, gt=0, le=1, description="NMS overlap of the proposals of a level")
    anchor_samples: int = Field(256, ge=2, description="anchors of an image that train")
    region_samples: int = Field(512, ge=4, description="regions of an image that train, in every stage")
    candidates: int = Field(4096, ge=1, description="best pairs of a region and a class that NMS looks at")
    roi_sampling: int = Field(0, ge=0, description="RoIAlign: points a cell and direction; 0: as many as it has pixels")
    roi_aligned: bool = Field(True, description="RoIAlign: shift by half a pixel; false: torchvision's detectors")
    rounded_anchors: bool = Field(False, description="anchors of whole px: torchvision's detectors")
    proposal_score: float = Field(0.0, ge=0, lt=1, description="proposals of a smaller one are left out")
    coarse: bool = Field(
        False, description="on a MobileNetV3: two maps of stride 32, 15 anchors a cell, as torchvision's detectors"
    )
    rpn_convs: int = Field(1, ge=1, le=64, description="3x3 convolutions of the proposal network")
    box_convs: int = Field(0, ge=0, le=64, description="3x3 convolutions of the second stage")
    box_layers: int = Field(2, ge=1, le=64, description="its fully connected layers")
    head_norm: bool = Field(False, description="batch norm in FPN and second stage: torchvision's second versions")

    def head_form(self) -> HeadForm:
        """Of the second stage."""
        return HeadForm(self.hidden, self.box_layers, self.box_convs, self.head_norm)

    def pooling(self) -> Pooling:
        """Of its box heads."""
        return Pooling(7, self.roi_sampling, self.roi_aligned)


class FasterRCNN(RoIDetector):
    """Faster R-CNN on any timm backbone.

    `features` of the output are the pyramid's maps of strides 4 to 32; a fifth, of stride 64, is taken from the last by
    skipping cells, and serves proposals alone. With `coarse` the pyramid has two maps of stride 32, and `features` is the
    first, the only one that regions are read from; the second serves proposals alone too. In training mode the output has no `stages`: only sampled regions go
    through the heads then, in `losses`.
    """

    Config = FasterRCNNConfig
    family = "faster-rcnn"
    class_predictors: ClassVar[tuple[str, ...]] = ("roi_head.bbox_head.0.fc_cls.", "roi_head.bbox_head.0.fc_reg.")

    cfg: FasterRCNNConfig

    def __init__(self, cfg: FasterRCNNConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.strides = COARSE if cfg.coarse else STRIDES
        self.backbone = build_coarse_backbone(cfg) if cfg.coarse else build_backbone(cfg, STRIDES)
        self.neck = PooledFPN(self.backbone.channels, cfg.channels, norm=cfg.head_norm)
        self.rpn_head = RPN(
            cfg.channels,
            strides=COARSE_LEVELS if cfg.coarse else RPN_STRIDES,
            sides=COARSE_ANCHORS if cfg.coarse else (),
            rounded=cfg.rounded_anchors,
            convs=cfg.rpn_convs,
        )
        self.roi_head = self.build_roi_head(len(names))
        self.spec = DetectorSpec(
            names=tuple(names),
            strides=self.strides,
            channels={
                Tap.BACKBONE: dict(zip(self.strides, self.backbone.channels, strict=not cfg.coarse)),
                Tap.NECK: dict.fromkeys(self.strides, cfg.channels),
            },
            box_code=BoxCode("anchors"),
            input=cfg.convention(),
            stable_locations=False,
        )

    def build_roi_head(self, classes: int) -> RoIHead:
        """The second stage."""
        cfg = self.cfg
        return RoIHead(
            cfg.channels,
            classes,
            self.stage_rules(),
            form=cfg.head_form(),
            pooling=cfg.pooling(),
            strides=self.strides,
        )

    def stage_rules(self) -> tuple[StageRule, ...]:
        """How each stage trains."""
        return (StageRule(samples=self.cfg.region_samples),)

    def rpn_rule(self) -> RPNRule:
        """How the proposal network trains."""
        return RPNRule(samples=self.cfg.anchor_samples)

    def stage_lines(self) -> dict[str, str]:
        cfg, rpn = self.cfg, self.rpn_head
        line = (
            f"{rpn.anchors} anchors a cell at strides {', '.join(map(str, rpn.strides))}; the best {cfg.test_anchors} of a "
            f"level, {cfg.test_proposals} of an image (in training {cfg.train_anchors}, {cfg.train_proposals}), NMS at IoU "
            f"{cfg.proposal_iou:g}"
        )
        return {"proposals": line} | self.roi_head.stage_lines()

    def pretrain(self) -> str | None:
        """Start the backbone from published weights. One that starts untrained trains whole: nothing of it is frozen."""
        self.cfg, note = start_backbone(self.backbone, self.cfg)
        return note

    def network(self, x: Tensor) -> RoIOutput:
        height, width = x.shape[-2:]
        self.check_size(height, width)
        backbone = tuple(self.backbone(x))
        pyramid = self.neck(backbone)
        rpn = self.rpn_head(with_pooled(pyramid), (height, width))
        shared = len(self.strides)
        features = pyramid[:shared]
        rpn.backbone_features, rpn.features = backbone[:shared], features
        proposals, _, valid = propose(rpn, self.proposal_rule())
        stages = () if self.training else self.roi_head.stages(features, proposals)
        return RoIOutput(rpn, proposals, valid, stages)

    def proposal_rule(self) -> ProposalRule:
        """How proposals are chosen, in training or at test."""
        cfg = self.cfg
        if self.training:
            return ProposalRule(cfg.train_anchors, cfg.train_proposals, cfg.proposal_iou, score=cfg.proposal_score)
        return ProposalRule(cfg.test_anchors, cfg.test_proposals, cfg.proposal_iou, score=cfg.proposal_score)

    def roi(self, features: tuple[Tensor, ...], boxes: Tensor, stage: int = 0) -> RoIStage:
        return self.roi_head.roi(features, boxes, stage)

    @torch.no_grad()
    def assign(self, out: RoIOutput, targets: Targets, draw: Draw = Draw()) -> RoIMatch:
        """Anchors and regions by their overlap with the boxes, and a random choice of both that follows from `draw`."""
        images, anchors = out.rpn.cls_logits.shape[:2]
        keys = random_keys(draw, Stream.RPN, images, anchors, out.proposals.device)
        match = assign_anchors(out.rpn, targets, self.rpn_rule(), keys)
        regions, stages = self.roi_head.assign(
            out.features, out.proposals, out.valid, targets, draw, areas(out.rpn, targets)
        )
        return RoIMatch(match, regions, stages)

    def losses(self, out: RoIOutput, targets: Targets, match: RoIMatch) -> Losses:
        """`rpn/cls` and `rpn/box` (see `rpn_losses`), and those of the second stage (see `RoIHead.losses`)."""
        first = rpn_losses(out.rpn, targets, match.rpn, self.rpn_rule())
        return first | self.roi_head.losses(out.features, targets, match.boxes, match.stages)

    def candidates(self, out: RoIOutput) -> tuple[Tensor, Tensor]:
        """The best pairs of a proposal and a class: the class's own box, and its score; every row has one class."""
        stages = out.stages or self.roi_head.stages(out.features, out.proposals)
        scores = self.roi_head.scores(stages) * out.valid.unsqueeze(-1)
        height, width = out.image_size
        area = constant(((width, height),), out.proposals.dtype, out.proposals.device)
        boxes = self.roi_head.boxes(stages, area.expand(len(scores), 2))
        return best_pairs(boxes, scores, self.cfg.candidates)
