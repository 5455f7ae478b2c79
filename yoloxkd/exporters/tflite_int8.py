"""int8 convolutions in a float32 TFLite file: codes around each, as in an ONNX file; what is between them in float32.

The numbers are TensorFlow Lite's 8-bit quantization specification: int8 activations with a step a tensor, int8 weights
with a step an output channel, int32 biases in steps of their product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from yoloxkd.exporters.layer_steps import LayerSteps
from yoloxkd.exporters.tflite_graph import TfliteGraph
from yoloxkd.nn.fake_quantization import CODES

_SIGNED = 128
"""Codes of activations are -128 to 127 there."""
_BIAS_MOST = 2**31 - 1


def with_int8(content: bytes, steps: Mapping[str, LayerSteps]) -> tuple[bytes, set[str]]:
    """The file with these layers in int8, and the names of those that it has.

    The converter may put what stands before a convolution, such as the input's normalization, into its weights: then the
    layer is not found, and stays in float32.
    """
    graph = TfliteGraph(content)
    rewriter = _Rewriter(graph, steps)
    return graph.content(_codes_before_padding(graph, rewriter.run())), rewriter.done


class _Rewriter:
    """Works through a graph once; done: names of the layers that were found."""

    def __init__(self, graph: TfliteGraph, steps: Mapping[str, LayerSteps]) -> None:
        self.graph = graph
        self.done: set[str] = set()
        self._steps = steps
        self._name_of = {_key(one.weights): name for name, one in steps.items()}
        self._codes: dict[tuple[int, float, int], int] = {}
        self._weights: dict[int, int] = {}
        self._operators: list[Any] = []
        self._types: Any = graph.schema.TensorType

    def run(self) -> list[Any]:
        """The new operators."""
        for operator in self.graph.operators:
            name = self._layer(operator) if self.graph.is_convolution(operator) else None
            if name is None:
                self._operators.append(operator)
            else:
                self.done.add(name)
                self._convert(operator, self._steps[name])
        return self._operators

    def _layer(self, operator: Any) -> str | None:
        weights = self.graph.array(operator.inputs[1])
        if weights is None:
            return None
        # (cout, kh, kw, cin / groups), and of a depthwise one (1, kh, kw, cout)
        return self._name_of.get(_key(weights.transpose((3, 0, 1, 2) if self._depthwise(operator) else (0, 3, 1, 2))))

    def _depthwise(self, operator: Any) -> bool:
        return bool(self.graph.kind(operator) == self.graph.kinds.DEPTHWISE_CONV_2D)

    def _convert(self, operator: Any, steps: LayerSteps) -> None:
        before, after = operator.inputs[0], operator.outputs[0]
        output = self._within_activation(operator, steps.output)
        weights = int(operator.inputs[1])
        if weights not in self._weights:
            self._weights[weights] = self._int8_weights(weights, steps, self._depthwise(operator))
        inputs = [self._quantized(before, *steps.input), self._weights[weights]]
        if len(operator.inputs) > 2 and operator.inputs[2] >= 0:
            inputs.append(self._int32_bias(operator.inputs[2], steps))
        codes = self._activation(after, *output)
        operator.inputs, operator.outputs = inputs, [codes]
        self._operators += [operator, self.graph.operator(self.graph.kinds.DEQUANTIZE, codes, after)]

    def _within_activation(self, operator: Any, output: tuple[float, int]) -> tuple[float, int]:
        """The output's step and code of zero, where the convolution holds a ReLU that cuts the range."""
        kinds = self.graph.schema.ActivationFunctionType
        limits = {kinds.RELU: (0.0, np.inf), kinds.RELU6: (0.0, 6.0), kinds.RELU_N1_TO_1: (-1.0, 1.0)}
        low, high = limits.get(operator.builtinOptions.fusedActivationFunction, (-np.inf, np.inf))
        step, zero = output
        whole = (-zero * step, (CODES - zero) * step)
        lowest, highest = max(whole[0], low), min(whole[1], high)
        if (lowest, highest) == whole or highest <= lowest:
            return output
        cut = (highest - lowest) / CODES
        return cut, int(np.clip(np.rint(-lowest / cut), 0, CODES))

    def _quantized(self, tensor: int, step: float, zero: int) -> int:
        """The codes of a tensor, made once for all who read them alike."""
        key = (int(tensor), step, zero)
        if key not in self._codes:
            self._codes[key] = self._activation(tensor, step, zero)
            self._operators.append(self.graph.operator(self.graph.kinds.QUANTIZE, tensor, self._codes[key]))
        return self._codes[key]

    def _activation(self, like: int, step: float, zero: int) -> int:
        return self.graph.with_steps(self.graph.tensor(like, self._types.INT8), [step], [zero - _SIGNED])

    def _int8_weights(self, like: int, steps: LayerSteps, depthwise: bool) -> int:
        codes = steps.weight_codes().transpose((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
        made = self.graph.tensor(like, self._types.INT8, codes)
        return self.graph.with_steps(made, steps.weight_steps, [0] * len(steps.weight_steps), 3 if depthwise else 0)

    def _int32_bias(self, like: int, steps: LayerSteps) -> int:
        bias = self.graph.array(like)
        assert bias is not None
        step = steps.weight_steps * np.float32(steps.input[0])
        codes = np.clip(np.rint(bias.astype(np.float64) / step), -_BIAS_MOST, _BIAS_MOST).astype(np.int32)
        return self.graph.with_steps(self.graph.tensor(like, self._types.INT32, codes), step, [0] * len(step))


def _codes_before_padding(graph: TfliteGraph, operators: list[Any]) -> list[Any]:
    """The operators, with what is padded and then rounded rounded first: zero is one of the codes."""
    readers: dict[int, list[Any]] = defaultdict(list)
    for operator in operators:
        for tensor in {int(i) for i in operator.inputs}:
            readers[tensor].append(operator)
    outputs = set(graph.outputs)
    moved: dict[int, Any] = {}
    dropped: set[int] = set()
    for pad in operators:
        if graph.kind(pad) != graph.kinds.PAD or int(pad.outputs[0]) in outputs:
            continue
        after = readers[int(pad.outputs[0])]
        if len(after) != 1 or graph.kind(after[0]) != graph.kinds.QUANTIZE:
            continue
        (quantize,) = after
        source, padded = int(pad.inputs[0]), int(quantize.outputs[0])
        codes = graph.with_meaning_of(graph.tensor(source, graph.schema.TensorType.INT8), padded)
        pad.inputs, pad.outputs = [codes, *pad.inputs[1:]], [padded]
        moved[id(pad)] = graph.operator(graph.kinds.QUANTIZE, source, codes)
        dropped.add(id(quantize))
    made = []
    for operator in operators:
        if id(operator) in moved:
            made.append(moved[id(operator)])
        if id(operator) not in dropped:
            made.append(operator)
    return made


def _key(weights: np.ndarray) -> bytes:
    return np.ascontiguousarray(weights, np.float32).tobytes()
