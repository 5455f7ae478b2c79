"""fp16 export: convolutions and what leads to them, but for where deformable ones look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

_STAYS_FLOAT = {("Resize", 2)}  # (operator, input) that the standard wants in float32: the scales of a resize


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph with its convolutions, and all arithmetic that leads to them, in fp16.

    From the last convolutions on (box decoding, scores, suppression and its thresholds) everything stays float32, as do
    inputs and outputs: fp16 has steps of half a pixel at 640 px, too coarse for boxes. For the same reason the places that a
    deformable convolution samples at, and the sampling itself (`GridSample`), stay float32; the offsets come of convolutions.
    """
    import onnx
    from onnxscript import ir

    graph_model = ir.from_proto(onnx.shape_inference.infer_shapes(model))
    graph = graph_model.graph
    network = _leading_to_convolutions(graph)
    halves: dict[Any, Any] = {}
    for node in network:
        for at, value in enumerate(node.inputs):
            inside = value is not None and value.producer() in network
            if value is None or inside or value.dtype != ir.DataType.FLOAT or (node.op_type, at) in _STAYS_FLOAT:
                continue
            if value not in halves:
                halves[value] = _half_of(graph, value, node)
            node.replace_input_with(at, halves[value])
    for node in network:
        _constants_to_half(node)
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.dtype = ir.DataType.FLOAT16
                _float_for_the_rest(graph, value, network)
    graph.sort()
    _drop_unused(graph)
    return ir.to_proto(graph_model)


def _leading_to_convolutions(graph: Any) -> set[Any]:
    network: set[Any] = set()
    read: set[Any] = set()
    for node in reversed(graph):
        if node.op_type == "GridSample":
            read.add(node.inputs[0])  # the map; what leads to the places does not belong to the network
        elif node.op_type == "Conv" or read.intersection(node.outputs):
            network.add(node)
            read.update(node.inputs)
    return network


def _half_of(graph: Any, value: Any, reader: Any) -> Any:
    """The fp16 twin of a value from outside the network: a converted constant, or a cast."""
    from onnxscript import ir

    if value.is_initializer():
        half = ir.tensor(value.const_value.numpy().astype(np.float16), name=f"{value.name}_half")
        twin = ir.Value(name=half.name, type=ir.TensorType(half.dtype), shape=half.shape, const_value=half)
        graph.register_initializer(twin)
        return twin
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16}, name=f"{value.name}_to_half")
    cast.outputs[0].name, cast.outputs[0].dtype = f"{value.name}_half", ir.DataType.FLOAT16
    cast.outputs[0].shape = value.shape
    graph.insert_before(reader, cast)
    return cast.outputs[0]


def _constants_to_half(node: Any) -> None:
    """Casts to float32 and literal float32 tensors inside the network become fp16."""
    from onnxscript import ir

    for name, attribute in list(node.attributes.items()):
        if node.op_type == "Cast" and name == "to" and attribute.value == ir.DataType.FLOAT:
            node.attributes[name] = ir.Attr(name, ir.AttributeType.INT, int(ir.DataType.FLOAT16))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT:
            half = ir.tensor(attribute.value.numpy().astype(np.float16))
            node.attributes[name] = ir.Attr(name, ir.AttributeType.TENSOR, half)


def _float_for_the_rest(graph: Any, value: Any, network: set[Any]) -> None:
    """Readers of an fp16 value that lie outside the network, the graph's outputs too, get it cast back to float32."""
    from onnxscript import ir

    readers = [(node, at) for node, at in value.uses() if node not in network]
    places = [at for at, output in enumerate(graph.outputs) if output is value]
    if not readers and not places:
        return
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}_to_float")
    cast.outputs[0].name, cast.outputs[0].dtype = f"{value.name}_float", ir.DataType.FLOAT
    cast.outputs[0].shape = value.shape
    graph.insert_after(value.producer(), cast)
    for node, at in readers:
        node.replace_input_with(at, cast.outputs[0])
    for at in places:
        value.name, cast.outputs[0].name = f"{value.name}_half", value.name
        graph.outputs[at] = cast.outputs[0]


def _drop_unused(graph: Any) -> None:
    """Constants whose only readers now read their fp16 twin."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
