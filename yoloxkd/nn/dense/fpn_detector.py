"""Base class of detectors on a timm backbone with an FPN and towers shared by all levels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from yoloxkd.config.strict import Strict
from yoloxkd.nn.backbones.timm_backbone import STRIDES, Style, TimmBackbone, gray, input_convention
from yoloxkd.nn.dense.dense_detector import DenseDetector, Maps
from yoloxkd.nn.detector import BoxCode, DetectorSpec, InputConvention, Quality
from yoloxkd.nn.necks.fpn import FPN
from yoloxkd.types import Tap

PRIOR = 0.01
"""The probability an untrained head gives to every class."""
LEVELS = (8, 16, 32, 64, 128)

Triple = tuple[float, float, float]


class FPNConfig(Strict):
    """Keys of every detector on an FPN."""

    backbone: str = Field("resnet50", description="a timm model that gives maps of strides 8, 16, 32")
    backbone_weights: str = Field("imagenet", description="imagenet (timm's own), package, none, or a file")
    style: Style = Field("pytorch", description="caffe: a ResNet's stride in the 1x1 convolution")
    frozen_stages: int = Field(1, ge=0, le=4, description="0: none; n: the stem and n stages keep their weights")
    norm_eval: bool = Field(True, description="the backbone's batch norms keep their statistics")
    norm_frozen: bool = Field(False, description="their weights and biases do not train either")
    last_conv: bool = Field(
        False,
        description="MobileNetV2, EfficientNet: stride 32 after the network's last 1x1 convolution (1280 channels)",
    )
    channels: int = Field(256, ge=1, le=4096, description="of the FPN and of the towers")
    stacked_convs: int = Field(4, ge=1, le=64, description="blocks of each tower")
    groups: int = Field(32, ge=1, le=4096, description="of the towers' group norms")
    bgr: bool = Field(False, description="the backbone reads BGR")
    mean: Triple | None = Field(
        None, description="0..255, in the backbone's channel order; None: that of timm's weights"
    )
    std: Triple | None = Field(None, description="likewise")

    @field_validator("std")
    @classmethod
    def _divisor(cls, value: Triple | None) -> Triple | None:
        if value is not None and not all(1e-3 <= part <= 1e6 for part in value):
            raise ValueError("should be three numbers from 0.001 to 1000000")
        return value

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.channels % self.groups:
            raise ValueError(f"channels {self.channels} should be a multiple of groups {self.groups}")
        return self

    def convention(self) -> InputConvention:
        """How the backbone wants its pixels; padding has its mean color."""
        found = input_convention(self.backbone)
        if self.bgr:
            found = replace(found, bgr=True, mean=found.mean[::-1], std=found.std[::-1])
        if self.std is not None:
            found = replace(found, std=self.std)
        if self.mean is not None:
            found = replace(found, mean=self.mean)
        return replace(found, pad_value=gray(found.mean[::-1] if found.bgr else found.mean))


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that also takes a group of a single value, as one channel of a 1x1 map is; it becomes the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class TowerBlock(nn.Module):
    """3x3 convolution, group norm, ReLU; the attribute names are those of mmdetection's keys."""

    def __init__(self, channels: int, groups: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.gn = GroupNorm(groups, channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.gn(self.conv(x)))
        return y


class Scale(nn.Module):
    """One learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class SharedHead(nn.Module):
    """A classification and a regression tower that all levels share, and one learned scale a level."""

    def __init__(self, cfg: FPNConfig, levels: int, *, bias: bool) -> None:
        super().__init__()

        def tower() -> nn.ModuleList:
            return nn.ModuleList(TowerBlock(cfg.channels, cfg.groups, bias=bias) for _ in range(cfg.stacked_convs))

        self.cls_convs = tower()
        self.reg_convs = tower()
        self.scales = nn.ModuleList(Scale() for _ in range(levels))

    def initialize(self, classifier: nn.Conv2d) -> None:
        """Small weights, zero biases, and the prior for every class."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(classifier.get_parameter("bias"), -math.log((1 - PRIOR) / PRIOR))


class FPNDetector(DenseDetector):
    """Backbone and FPN; a subclass adds `head`, whose towers all levels share.

    `features` of the output are the FPN's maps, `cls_features` and `reg_features` the first block of each tower.
    """

    quality: ClassVar[Quality | None] = None

    cfg: FPNConfig
    head: SharedHead

    def __init__(self, cfg: FPNConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.backbone = TimmBackbone(
            cfg.backbone,
            frozen_stages=cfg.frozen_stages,
            norm_eval=cfg.norm_eval,
            norm_frozen=cfg.norm_frozen,
            style=cfg.style,
            last_conv=cfg.last_conv,
        )
        self.neck = FPN(self.backbone.channels, cfg.channels, relu_before_last=self.relu_before_last)
        maps = dict.fromkeys(LEVELS, cfg.channels)
        self.spec = DetectorSpec(
            names=tuple(names),
            strides=LEVELS,
            channels={
                Tap.BACKBONE: dict(zip(STRIDES, self.backbone.channels, strict=True)),
                Tap.NECK: maps,
                Tap.CLS: maps,
                Tap.REG: maps,
            },
            box_code=self.box_code,
            input=cfg.convention(),
            quality=self.quality,
        )

    @property
    @abstractmethod
    def box_code(self) -> BoxCode:
        """What `box_raw` holds."""

    @property
    def relu_before_last(self) -> bool:
        """Whether the FPN's coarsest level reads the one before through a ReLU."""
        return False

    @property
    def size_multiple(self) -> int:
        """32: the coarser levels have as many cells as their convolutions give, that is rounded up."""
        return 32

    def pretrain(self) -> str | None:
        """Start the backbone from published weights. One that starts untrained trains whole: nothing of it is frozen."""
        start = self.backbone.start(self.cfg.backbone_weights)
        if not start.trained and (self.cfg.frozen_stages or self.cfg.norm_eval or self.cfg.norm_frozen):
            self.cfg = self.cfg.model_copy(update={"frozen_stages": 0, "norm_eval": False, "norm_frozen": False})
            self.backbone.freeze(0, norm_eval=False)
            return f"{start.note}; nothing of it is frozen therefore"
        return start.note

    def pyramid(self, x: Tensor) -> tuple[Maps, Maps]:
        maps = tuple(self.backbone(x))
        return maps, self.neck(maps)

    def tower(self, branch: Tap, maps: Maps, start: int = 0, stop: int | None = None) -> Maps:
        blocks = list(self.head.cls_convs if branch == Tap.CLS else self.head.reg_convs)[start:stop]
        out = []
        for x in maps:
            for block in blocks:
                x = block(x)
            out.append(x)
        return tuple(out)
