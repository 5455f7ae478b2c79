"""Settings of int8: of an export (`--set export.KEY=VALUE`) and of training for it (the recipe's `quantize` section)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from yoloxkd.config.strict import Strict


class Quantization(Strict):
    """Static quantization of an export's convolutions; docs/quantization.md holds the trials behind the defaults."""

    method: Literal["minmax", "percentile", "entropy"] = Field(
        "minmax", description="how the range of an activation follows from the calibration images"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="of method percentile")
    silu_floor: float | None = Field(
        -6.0,
        lt=0,
        ge=-1e6,
        description="ranges that only a SiLU reads start here, below which SiLU is nearly 0; None: anywhere",
    )
    reduce_range: bool = Field(
        True, description="7-bit weights: with 8 bits, CPUs without VNNI overflow and lose detections"
    )
    images: int = Field(50, ge=1, le=1_000_000, description="calibration images, at most")
    float_layers: list[str] | None = Field(
        None, description="layers (the start of their names) kept in float32; None: found by the sensitivity report"
    )
    sensitivity: bool = Field(False, description="print what quantizing each layer alone costs")
    seconds: float = Field(
        120,
        gt=0,
        le=1e6,
        description="what the sensitivity report may take; where single layers take longer, groups are tried",
    )


class QuantizeSection(Strict):
    """Training for int8: the student's convolutions are rounded as an int8 file will round them, see docs/quantization.md."""

    kind: Literal["off", "int8"] = Field(
        "off", description="int8: from a trained student; `quantize: int8` sets it too"
    )
    weight_bits: Literal[7, 8] = Field(
        7,
        description="8: finer, and for devices that sum products in 32 bits alone: CPUs without VNNI overflow, as with "
        "export.reduce_range=false",
    )
    images: int = Field(
        50, ge=1, le=1_000_000, description="training images that the first ranges follow from, at most"
    )
    momentum: float = Field(0.02, gt=0, le=1, description="how far a step moves the ranges towards what it saw")
    freeze: float = Field(0.7, ge=0, le=1, description="part of the steps after which the ranges stay")

    @field_validator("kind", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as False
