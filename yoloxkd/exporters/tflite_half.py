"""fp16 weights in a float32 TFLite file: half the size; a runtime widens them when it loads the file."""

from __future__ import annotations

from typing import Any

import numpy as np

from yoloxkd.exporters.tflite_graph import TfliteGraph


def with_half_weights(content: bytes) -> bytes:
    """The file with the weights of all convolutions in fp16; biases and arithmetic stay float32."""
    graph = TfliteGraph(content)
    widened: dict[int, int] = {}
    operators: list[Any] = []
    for operator in graph.operators:
        weights = int(operator.inputs[1]) if graph.is_convolution(operator) else -1
        array = graph.array(weights) if weights >= 0 else None
        if array is not None:
            if weights not in widened:
                half = graph.tensor(weights, graph.schema.TensorType.FLOAT16, array.astype(np.float16))
                widened[weights] = graph.tensor(weights, graph.schema.TensorType.FLOAT32)
                operators.append(graph.operator(graph.kinds.DEQUANTIZE, half, widened[weights]))
            operator.inputs = [operator.inputs[0], widened[weights], *operator.inputs[2:]]
        operators.append(operator)
    return graph.content(operators)
