"""Keys, construction and initial weights of a timm backbone under a feature pyramid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from pydantic import Field, field_validator

from yoloxkd.config.strict import Strict
from yoloxkd.nn.backbones.coarse_mobilenet import CoarseMobileNet
from yoloxkd.nn.backbones.timm_backbone import Style, TimmBackbone, gray, input_convention
from yoloxkd.nn.detector import InputConvention

Triple = tuple[float, float, float]


class PyramidConfig(Strict):
    """Keys of every detector on a feature pyramid."""

    backbone: str = Field(description="a timm model that gives maps of strides 8, 16, 32")
    backbone_weights: str = Field("imagenet", description="imagenet (timm's own), package, none, or a file")
    style: Style = Field("pytorch", description="caffe: a ResNet's stride in the 1x1 convolution")
    frozen_stages: int = Field(ge=0, le=4, description="0: none; n: the stem and n stages keep their weights")
    norm_eval: bool = Field(description="the backbone's batch norms keep their statistics")
    norm_frozen: bool = Field(False, description="their weights and biases do not train either")
    norm_eps: float | None = Field(
        None, ge=0, le=1, description="added to their variances; None: that of the network. Some of torchvision's: 0"
    )
    last_conv: bool = Field(
        False,
        description="MobileNetV2, EfficientNet: stride 32 after the network's last 1x1 convolution (1280 channels)",
    )
    deformable_stages: int = Field(
        0, ge=0, le=3, description="of a ResNet, from the coarsest: their 3x3 convolutions are deformable"
    )
    channels: int = Field(256, ge=1, le=4096, description="of the pyramid and of the towers")
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

    def convention(self) -> InputConvention:
        """How the backbone wants its pixels; padding has its mean color."""
        convention = input_convention(self.backbone)
        if self.bgr:
            convention = replace(convention, bgr=True, mean=convention.mean[::-1], std=convention.std[::-1])
        if self.std is not None:
            convention = replace(convention, std=self.std)
        if self.mean is not None:
            convention = replace(convention, mean=self.mean)
        return replace(convention, pad_value=gray(convention.mean[::-1] if convention.bgr else convention.mean))


C = TypeVar("C", bound=PyramidConfig)


def build_backbone(cfg: PyramidConfig, strides: tuple[int, ...]) -> TimmBackbone:
    """The backbone of these keys, with random weights."""
    return TimmBackbone(cfg.backbone, strides=strides, **_backbone_keys(cfg))


def build_coarse_backbone(cfg: PyramidConfig) -> CoarseMobileNet:
    """The same with two maps of stride 32. UserError: it is no MobileNetV3."""
    return CoarseMobileNet(cfg.backbone, **_backbone_keys(cfg))


def _backbone_keys(cfg: PyramidConfig) -> dict[str, Any]:
    names = ("frozen_stages", "norm_eval", "norm_frozen", "norm_eps", "style", "last_conv", "deformable_stages")
    return {name: getattr(cfg, name) for name in names}


def start_backbone(backbone: TimmBackbone, cfg: C) -> tuple[C, str | None]:
    """Give the backbone published weights; the keys that hold from then on, and a sentence for the log.

    One that starts untrained trains whole: nothing of it is frozen.
    """
    start = backbone.start(cfg.backbone_weights)
    if not start.trained and (cfg.frozen_stages or cfg.norm_eval or cfg.norm_frozen):
        backbone.freeze(0, norm_eval=False)
        changed = cfg.model_copy(update={"frozen_stages": 0, "norm_eval": False, "norm_frozen": False})
        return changed, f"{start.note}; nothing of it is frozen therefore"
    return cfg, start.note
