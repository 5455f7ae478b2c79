"""int8 in an exported program: convolutions between quantize and dequantize operators, as ExecuTorch's backends read them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.exporters.layer_steps import WEIGHT_MOST, LayerSteps
from yoloxkd.nn.conv_followers import replace_modules
from yoloxkd.nn.deform import DeformableConv
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import CODES

_SIGNED = 128
"""Codes of activations are -128 to 127 there."""


class CodedConv(nn.Module):
    """A convolution whose weights are int8 codes and whose input and output pass through int8 codes.

    forward: (N, cin, H, W) float32 -> (N, cout, H', W') float32
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, conv: nn.Module, steps: LayerSteps) -> None:
        import torch.ao.quantization.fx._decomposed  # registers the operators

        super().__init__()
        self.conv = copy.deepcopy(conv)
        self.input, self.output = steps.input, steps.output
        self.register_buffer("codes", torch.from_numpy(steps.weight_codes()))
        self.register_buffer("scales", torch.from_numpy(steps.weight_steps))
        self.register_buffer("zeros", torch.zeros(len(steps.weight_steps), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
        weight = dequantize(self.codes, self.scales, self.zeros, 0, -WEIGHT_MOST, WEIGHT_MOST, torch.int8)
        y = torch.func.functional_call(self.conv, {"weight": weight}, (_through_codes(x, *self.input),))
        return _through_codes(y, *self.output)


def coded_form(detector: Detector[Any, Any], steps: Mapping[str, LayerSteps]) -> None:
    """Put these layers of a detector in edge form between codes, in place; those outside `codable` stay in float32."""
    layers = {name: detector.get_submodule(name) for name in codable(detector, steps)}
    replace_modules(detector, {layer: CodedConv(layer, steps[name]) for name, layer in layers.items()})


def codable(detector: Detector[Any, Any], names: Iterable[str]) -> list[str]:
    """Those of these layers that can stand between codes: a deformable convolution's range is of its samples, not of its input."""
    return [name for name in names if not isinstance(detector.get_submodule(name), DeformableConv)]


def _through_codes(x: Tensor, step: float, zero: int) -> Tensor:
    operators = torch.ops.quantized_decomposed
    codes = (step, zero - _SIGNED, -_SIGNED, CODES - _SIGNED, torch.int8)
    y: Tensor = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *codes), *codes)
    return y
