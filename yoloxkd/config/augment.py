"""The `augment` section of a recipe: augmentation of training images."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from yoloxkd.config.strict import Strict

MOST_STEPS = 256
"""Of 32 px, that multi-scale training may vary the input's side by."""


class Augment(Strict):
    """Augmentation of training images. Defaults are YOLOX's; the final epochs of a run use color and flip alone."""

    mosaic: float = Field(1.0, ge=0, le=1, description="probability of a mosaic of four images")
    mosaic_pool: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="0: the other three images of a mosaic are any of the split, as YOLOX's; n: they are among the n "
        "before it in the epoch's random order, which are still in memory, so that less is decoded",
    )
    mixup: float = Field(0.0, ge=0, le=1, description="probability that a mosaic is blended with an image")
    mixup_scale: tuple[float, float] = Field((0.5, 1.5), description="size of the blended image, lowest and highest")
    degrees: float = Field(10.0, ge=0, le=180, description="a mosaic is turned by up to this many degrees, either way")
    translate: float = Field(0.1, ge=0, le=1, description="a mosaic is moved by up to this part of the input's side")
    scale: tuple[float, float] = Field((0.1, 2.0), description="size of a mosaic's images, lowest and highest")
    shear: float = Field(2.0, ge=0, lt=45, description="a mosaic is sheared by up to this many degrees")
    hsv: tuple[float, float, float] = Field(
        (5, 30, 30),
        description="largest shift of hue (0..180), saturation and value (0..255); each applied half the time",
    )
    hsv_prob: float = Field(1.0, ge=0, le=1, description="probability of the color shift")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a left-right flip")
    gray: float = Field(0.0, ge=0, le=1, description="probability that the image loses its color")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a slight Gaussian blur")
    noise: float = Field(0.0, ge=0, le=1, description="probability of slight Gaussian noise")
    multiscale: tuple[int, int] = Field(
        (-5, 5),
        description="the input size of a batch varies by this many steps of 32 px, lowest and highest; 0: fixed",
    )

    short_sides: list[int] = Field(
        default_factory=list,
        description="for a train.imgsz of two sides, the short side of each image: two, anything from the first to the "
        "second; more, one of them; none, that of train.imgsz",
    )

    @field_validator("short_sides")
    @classmethod
    def _sides(cls, value: list[int]) -> list[int]:
        if any(not 32 <= side <= 16_384 for side in value) or (len(value) == 2 and value[0] > value[1]):
            raise ValueError("should be sides of 32 to 16384 px; two are a range, lowest first")
        return value

    @field_validator("scale", "mixup_scale")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 10:
            raise ValueError("should be two numbers, lowest first, between 0 (excluded) and 10")
        return value

    @field_validator("multiscale", mode="before")
    @classmethod
    def _symmetric_range(cls, value: object) -> object:
        return (-abs(value), abs(value)) if type(value) is int else value

    @field_validator("multiscale")
    @classmethod
    def _check_multiscale(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not -MOST_STEPS <= value[0] <= 0 <= value[1] <= MOST_STEPS:
            raise ValueError(f"should be a number of steps up to {MOST_STEPS}, or two around 0, lowest first")
        return value

    @field_validator("hsv")
    @classmethod
    def _gains(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(0 <= gain <= limit for gain, limit in zip(value, (75, 255, 255), strict=True)):
            raise ValueError("should be three gains: hue 0 to 75, saturation 0 to 255, value 0 to 255")
        return value

    @model_validator(mode="after")
    def _mixup_needs_mosaic(self) -> Self:
        if self.mixup > 0 and self.mosaic == 0:
            raise ValueError("augment.mixup blends into mosaics, so it needs augment.mosaic above 0")
        return self
