"""int8 files of a model trained for int8: its own scales in the graph, and a check of every convolution."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from yoloxkd.exporters.base import Exportable
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import CODES, ActivationQuantizer, QuantizedConv, quantized_layers

if TYPE_CHECKING:
    import onnx

STEPS, SHARE = 1, 0.005
"""How far a code of a convolution's output may be from the model's, and in what part of them; ties and sums round differently."""


def with_scales(model: onnx.ModelProto, exportable: Exportable) -> onnx.ModelProto:
    """Put the scales of a model trained for int8 into its float32 graph, in place: int8 weights, and 8 bits around every convolution.

    exportable  the model whose graph it is
    """
    graph, layers = model.graph, quantized_layers(exportable.detector)
    arrays = {array.name: array for array in graph.initializer}
    made: dict[tuple[str, float, int], str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        layer = layers.get(_layer(node.input[1])) if node.op_type == "Conv" else None
        if layer is None:
            nodes.append(node)
            continue
        node.input[0] = _rounded(graph, nodes, made, node.input[0], layer.input)
        node.input[1] = _int8_weight(graph, nodes, arrays[node.input[1]], layer)
        float_output, node.output[0] = node.output[0], f"{node.output[0]}_float"
        nodes.append(node)
        _rounded(graph, nodes, made, node.output[0], layer.output, float_output)
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]  # of the float32 graph
    return model


def _rounded(
    graph: onnx.GraphProto,
    nodes: list[onnx.NodeProto],
    made: dict[tuple[str, float, int], str],
    name: str,
    quantizer: ActivationQuantizer,
    output: str | None = None,
) -> str:
    """Quantize and dequantize a tensor; what is read with the same scale several times is so once. The name of the result."""
    from onnx import helper

    assert quantizer.fixed is not None
    scale, zero = quantizer.fixed
    if output is None and (name, scale, zero) in made:
        return made[name, scale, zero]
    place = f"q{len(made)}"
    made[name, scale, zero] = output or f"{place}_out"
    constants = [
        _constant(graph, f"{place}_scale", np.float32(scale)), _constant(graph, f"{place}_zero", np.uint8(zero)),
    ]  # fmt: skip
    nodes.append(helper.make_node("QuantizeLinear", [name, *constants], [f"{place}_codes"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{place}_codes", *constants], [made[name, scale, zero]]))
    return made[name, scale, zero]


def _int8_weight(
    graph: onnx.GraphProto, nodes: list[onnx.NodeProto], array: onnx.TensorProto, layer: QuantizedConv
) -> str:
    """Make a layer's weights int8, where another level has not done so already. The name of what a convolution reads."""
    from onnx import TensorProto, helper, numpy_helper

    name, result = array.name, f"{array.name}_float"
    if array.data_type == TensorProto.INT8:
        return result
    assert layer.weight_scale is not None
    scale = layer.weight_scale.numpy()
    codes = np.rint(numpy_helper.to_array(array) / scale[:, None, None, None]).astype(np.int8)
    array.CopyFrom(numpy_helper.from_array(codes, name))
    inputs = [name, _constant(graph, f"{name}_scale", scale)]  # no code of zero: it is 0
    nodes.append(helper.make_node("DequantizeLinear", inputs, [result], axis=0))
    return result


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray | np.generic) -> str:
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """How far a convolution's output codes are from the model's, given the same input codes.

    steps  at most, of 256; share: part of the codes that differ
    """

    layer: str
    steps: int
    share: float


def layer_differences(model: onnx.ModelProto, detector: Detector[Any, Any], image: np.ndarray) -> list[LayerDifference]:
    """Every int8 convolution of a file in ONNX Runtime against the fake-quantized model, on an image (1, 3, H, W).

    A layer that several levels share comes once for each; one that is not int8 in the file differs everywhere.
    """
    import onnxruntime

    copy, places = _with_codes(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = sorted({name for place in places for name in place[1:]})
    values = dict(zip(names, session.run(names, {"images": image.astype(np.float32)}), strict=True))
    layers = quantized_layers(Exportable(detector).detector)
    differences = [
        _difference(name, layers[name], values[codes_in], values[codes_out]) for name, codes_in, codes_out in places
    ]
    return differences + [
        LayerDifference(name, CODES, 1.0) for name in layers.keys() - {difference.layer for difference in differences}
    ]


def _with_codes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[tuple[str, str, str]]]:
    """The graph with the codes around every convolution as outputs; (layer, codes of the input, codes of the output) of each."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    made_by = {name: node for node in copy.graph.node for name in node.output}
    read_by = defaultdict(list)
    for node in copy.graph.node:
        for name in node.input:
            read_by[name].append(node)
    places = []
    for node in copy.graph.node:
        if node.op_type != "Conv" or node.input[1] not in made_by:  # its weight is a float32 initializer
            continue
        weight = made_by[node.input[1]].input[0]
        (after,) = read_by[node.output[0]]
        places.append((_layer(weight), made_by[node.input[0]].input[0], after.output[0]))
    known = {output.name for output in copy.graph.output}
    for name in sorted({name for place in places for name in place[1:]} - known):
        copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    return copy, places


def _layer(weight: str) -> str:
    """The name of a layer of the detector, from that of its weight in a graph."""
    return weight.removesuffix(".weight").rpartition("detector.")[2]


def _difference(name: str, layer: QuantizedConv, codes_in: np.ndarray, codes_out: np.ndarray) -> LayerDifference:
    """What the layer makes of these codes, beside what the file made of them."""
    scale, zero = layer.input.codes()
    expected, step = _computed(layer, (torch.from_numpy(codes_in).float() - zero) * scale), layer.output.codes()
    codes = (expected / step[0]).round() + step[1]
    apart = (codes.clamp(0, CODES) - torch.from_numpy(codes_out).float()).abs()
    return LayerDifference(name, int(apart.max()), float((apart > 0).float().mean()))


def _computed(layer: QuantizedConv, x: Tensor) -> Tensor:
    """The convolution itself, of an input on its grid."""
    weight, bias = layer.rounded()
    if weight.shape[-1] == 1 and layer.kernel_size != (1, 1):  # of the samples of a deformable convolution
        return torch.nn.functional.conv2d(x, weight, bias, groups=layer.groups)
    y: Tensor = layer._conv_forward(x, weight, bias)
    return y


def layer_faults(differences: list[LayerDifference]) -> list[str]:
    """What lies outside of what rounding may do; empty when every layer is the model's."""
    wrong = [d for d in differences if d.steps > STEPS or d.share > SHARE]
    if not wrong:
        return []
    worst = max(wrong, key=lambda d: (d.steps, d.share))
    return [
        f"{len(wrong)} of {len(differences)} int8 convolutions differ from the model's; the worst, {worst.layer}, by "
        f"{worst.steps} steps, {worst.share:.2%} of its codes (allowed {STEPS}, {SHARE:.1%})"
    ]
