"""The int8 numbers of every convolution, for formats whose files are rewritten from float32: calibrated, or trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from yoloxkd.errors import UserError
from yoloxkd.exporters.int8 import Range
from yoloxkd.nn.backbones.timm_backbone import FixedSame
from yoloxkd.nn.conv_followers import replace_modules
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import CODES, LEAST_SCALE, QuantizedConv, QuantizedDeformable, quantized_layers

WEIGHT_MOST = 127
"""The largest code of a weight."""


@dataclass(frozen=True, slots=True)
class LayerSteps:
    """How a convolution is rounded.

    weights        (cout, cin / groups, kh, kw) float32, as they stand in the file
    weight_steps   (cout,) one step of each output channel; its code 0 is 0
    input, output  (step, code of zero) of activations whose codes are 0 to 255
    """

    weights: np.ndarray
    weight_steps: np.ndarray
    input: tuple[float, int]
    output: tuple[float, int]

    def weight_codes(self) -> np.ndarray:
        """(cout, cin / groups, kh, kw) int8."""
        codes = np.rint(self.weights / self.weight_steps[:, None, None, None])
        rounded: np.ndarray = np.clip(codes, -WEIGHT_MOST, WEIGHT_MOST).astype(np.int8)
        return rounded


def calibrated_steps(
    detector: Detector[Any, Any], ranges: Mapping[str, tuple[Range, Range]], most: int
) -> dict[str, LayerSteps]:
    """By layer, of measured ranges.

    detector  in the form whose weights are in the file
    ranges    of the inputs and outputs of its layers
    most      the largest code of a weight: 127, or 63 for weights of 7 bits
    """
    steps = {}
    for name, (before, after) in ranges.items():
        weights = _weights(detector.get_submodule(name))
        largest = np.abs(weights).reshape(len(weights), -1).max(axis=1)
        steps[name] = LayerSteps(weights, _at_least(largest / most), _of_range(before), _of_range(after))
    return steps


def rounded_form(detector: Detector[Any, Any]) -> dict[str, LayerSteps]:
    """Replace the convolutions of a model trained for int8 by plain ones with their rounded weights, in place.

    detector  of an `Exportable`, whose scales are plain numbers
    UserError: one is deformable, which only ONNX files hold in int8.
    """
    layers = quantized_layers(detector)
    if deformable := next((name for name, layer in layers.items() if isinstance(layer, QuantizedDeformable)), None):
        raise UserError(f"the deformable convolution {deformable} is trained for int8, which only ONNX files hold")
    plain: dict[nn.Module, nn.Conv2d] = {layer: _plain(layer) for layer in layers.values()}
    replace_modules(detector, plain)
    steps = {}
    for name, layer in layers.items():
        assert layer.weight_scale is not None
        assert layer.input.fixed is not None
        assert layer.output.fixed is not None
        steps[name] = LayerSteps(
            _weights(plain[layer]), layer.weight_scale.numpy(), layer.input.fixed, layer.output.fixed
        )
    return steps


def with_weights_of(detector: Detector[Any, Any], steps: Mapping[str, LayerSteps]) -> dict[str, LayerSteps]:
    """The same steps with the weights as they stand in the detector now, after `edge_form`."""
    return {
        name: LayerSteps(_weights(detector.get_submodule(name)), one.weight_steps, one.input, one.output)
        for name, one in steps.items()
    }


def all_weights(detector: Detector[Any, Any]) -> dict[str, np.ndarray]:
    """(cout, cin / groups, kh, kw) float32 of every convolution, by name."""
    return {name: _weights(module) for name, module in detector.named_modules() if isinstance(module, nn.Conv2d)}


def _plain(layer: QuantizedConv) -> nn.Conv2d:
    weight, bias = layer.rounded()
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    if layer.around is not None:
        return FixedSame(layer)
    conv = nn.Conv2d(1, 1, 1, bias=False, device="meta")
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        setattr(conv, name, getattr(layer, name))
    conv.weight, conv.bias = layer.weight, layer.bias
    return conv


def _weights(module: nn.Module) -> np.ndarray:
    weights: np.ndarray = np.ascontiguousarray(module.get_parameter("weight").detach().numpy(), np.float32)
    return weights


def _of_range(values: Range) -> tuple[float, int]:
    """(step, code of zero); the range is widened to hold 0."""
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    step = max((high - low) / CODES, LEAST_SCALE)
    return step, int(np.clip(np.rint(-low / step), 0, CODES))


def _at_least(steps: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.maximum(steps, LEAST_SCALE).astype(np.float32)
    return result
