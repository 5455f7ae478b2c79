"""ONNX operators of exported graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

NETWORK = frozenset(
    {
        "Add", "Cast", "Clip", "Concat", "Conv", "Div", "Exp", "Expand", "Gather", "InstanceNormalization", "MatMul", "MaxPool",
        "Mul", "Range", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Sub",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Backbones, necks, heads and box decoding: what a file without NMS has."""
SUPPRESSION = frozenset(
    {
        "ArgMax", "Equal", "GatherElements", "Greater", "GreaterOrEqual", "NonMaxSuppression", "Pad",
        "ReduceMax", "ReduceSum", "ScatterND", "TopK", "Where",
    }
)  # fmt: skip
"""What files with NMS inside have besides."""
QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""What int8 files have besides."""


def operators(model: onnx.ModelProto) -> set[str]:
    """The operators a graph uses; one outside ONNX's own set is named with its domain."""
    return {f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph.node}
