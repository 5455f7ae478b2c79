"""int8 search: return the most sensitive layers to float32 until the file passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import UserError, nearest
from yoloxkd.exporters.parity_report import ParityReport
from yoloxkd.exporters.sensitivity import Int8Maker, LayerCost, describe_costs, layer_costs
from yoloxkd.nn.detector import Detector

SHARES = (0.02, 0.04, 0.08, 0.16, 0.32)
"""Parts of the layers that are kept in float32, tried one after the other."""


def search_int8(
    maker: Int8Maker,
    images: Sequence[np.ndarray],
    settings: Quantization,
    judge: Callable[[list[str]], ParityReport],
    say: Callable[[str], None],
) -> ParityReport:
    """Choose the layers of an int8 file; returns the report on the last one judged, which may have faults.

    judge  writes the file with these layers in float32, and compares it with the model

    With `settings.float_layers` those layers stay float32 and one file is judged. Without, all layers are tried in
    int8 first, then with more and more of the worst of the sensitivity report in float32.
    """
    float_layers = [] if settings.float_layers is None else named_layers(maker.layers, settings.float_layers)
    report = judge(float_layers)
    costs: list[LayerCost] = []
    if settings.sensitivity or (report.faults() and settings.float_layers is None):
        costs = layer_costs(maker, images, settings.seconds)
    if settings.float_layers is None:
        order = [layer for cost in costs for layer in cost.layers]
        for share in SHARES:
            if not report.faults():
                break
            float_layers = order[: math.ceil(share * len(order))]
            report = judge(float_layers)
    report.float_layers = float_layers
    if settings.sensitivity:
        say(describe_costs(costs, float_layers))
    return report


def check_float_layers(detector: Detector[Any, Any], settings: Quantization) -> None:
    """UserError: one of `settings.float_layers` begins no convolution's name, as is seen before the graph is traced."""
    convolutions = [name for name, module in detector.named_modules() if isinstance(module, nn.Conv2d)]
    named_layers(convolutions, settings.float_layers or [])


def named_layers(layers: Sequence[str], starts: Sequence[str]) -> list[str]:
    """The layers whose names begin with one of `starts`. UserError: one of them begins no layer's name."""
    for start in starts:
        if not any(layer.startswith(start) for layer in layers):
            raise UserError(f"export.float_layers: no layer's name begins with '{start}'; {nearest(start, layers)}")
    return [layer for layer in layers if layer.startswith(tuple(starts))]
