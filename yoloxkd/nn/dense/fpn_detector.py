"""Base class of detectors on a timm backbone with an FPN and towers shared by all levels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from yoloxkd.nn.backbones.timm_backbone import STRIDES
from yoloxkd.nn.blocks import GroupNorm
from yoloxkd.nn.dense.dense_detector import DenseDetector, Maps
from yoloxkd.nn.detector import BoxCode, DetectorSpec, Quality
from yoloxkd.nn.necks.fpn import FPN
from yoloxkd.nn.pyramid import PyramidConfig, build_backbone, start_backbone
from yoloxkd.types import Tap

PRIOR = 0.01
"""The probability an untrained head gives to every class."""
LEVELS = (8, 16, 32, 64, 128)
PAIRS_PER_LEVEL = 1000
"""(location, class) pairs of a level that go into NMS: that of the published configurations of all these detectors."""


class FPNConfig(PyramidConfig):
    """Keys of every dense detector on an FPN."""

    stacked_convs: int = Field(4, ge=1, le=64, description="blocks of each tower")
    groups: int | None = Field(32, ge=1, le=4096, description="of the towers' group norms; null: towers without norm")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.groups is not None and self.channels % self.groups:
            raise ValueError(f"channels {self.channels} should be a multiple of groups {self.groups}")
        return self


class TowerBlock(nn.Module):
    """3x3 convolution, group norm (groups None: no norm), ReLU; the attribute names are those of mmdetection's keys."""

    def __init__(self, channels: int, groups: int | None, *, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.gn = nn.Identity() if groups is None else GroupNorm(groups, channels)
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
    """A classification and a regression tower that all levels share, and one learned scale a level (levels 0: none)."""

    def __init__(self, cfg: FPNConfig, levels: int, *, bias: bool) -> None:
        super().__init__()

        def tower() -> nn.ModuleList:
            return nn.ModuleList(TowerBlock(cfg.channels, cfg.groups, bias=bias) for _ in range(cfg.stacked_convs))

        self.cls_convs = tower()
        self.reg_convs = tower()
        self.scales = nn.ModuleList(Scale() for _ in range(levels))

    def initialize(self, classifier: nn.Conv2d, prior: float = PRIOR) -> None:
        """Small weights, zero biases, and the prior probability for every class."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(classifier.get_parameter("bias"), -math.log((1 - prior) / prior))


class FPNDetector(DenseDetector):
    """Backbone and FPN; a subclass adds `head`, whose towers all levels share.

    `features` of the output are the FPN's maps, `cls_features` and `reg_features` the first block of each tower.
    """

    quality: ClassVar[Quality | None] = None
    reads_predictions: ClassVar[bool] = False
    channels_last_on_cpu = False

    cfg: FPNConfig
    head: SharedHead

    def __init__(self, cfg: FPNConfig, names: Sequence[str]) -> None:
        super().__init__(cfg, names)
        self.backbone = build_backbone(cfg, STRIDES)
        self.neck = FPN(
            self.backbone.channels,
            cfg.channels,
            relu_before_last=self.relu_before_last,
            extra_on_input=self.extra_on_input,
            groups=self.neck_groups,
        )
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
            pairs_per_level=PAIRS_PER_LEVEL,
            quality=self.quality,
            reads_predictions=self.reads_predictions,
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
    def extra_on_input(self) -> bool:
        """Whether the FPN's level of stride 64 reads the backbone's map of stride 32, instead of the FPN's own."""
        return False

    @property
    def neck_groups(self) -> int | None:
        """Groups of the FPN's group norms; None: it has none."""
        return None

    @property
    def size_multiple(self) -> int:
        """32: the coarser levels have as many cells as their convolutions give, that is rounded up."""
        return 32

    def pretrain(self) -> str | None:
        """Start the backbone from published weights. One that starts untrained trains whole: nothing of it is frozen."""
        self.cfg, note = start_backbone(self.backbone, self.cfg)
        return note

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
