"""Settings of an int8 export: what `yoloxkd export --int8 --set export.KEY=VALUE` takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
