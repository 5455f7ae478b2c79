"""A small float32 TFLite file made by hand: two convolutions and a depthwise one with a ReLU6 inside."""

from __future__ import annotations

from typing import Any

import numpy as np

SIDE = 8


def arrays() -> dict[str, np.ndarray]:
    """Weights (cout, cin / groups, kh, kw) and biases by layer, as torch has them."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        made: np.ndarray = rng.normal(size=shape).astype(np.float32)
        return made

    return {
        "first": normal(6, 3, 3, 3), "first_bias": normal(6),
        "depthwise": normal(6, 1, 3, 3), "depthwise_bias": normal(6),
        "last": normal(4, 6, 1, 1), "last_bias": normal(4),
    }  # fmt: skip


def small_file() -> bytes:
    """input (1, 8, 8, 3) -> first, SAME -> PAD -> depthwise, VALID, ReLU6 -> last (1, 8, 8, 4)."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    values = arrays()
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.operatorCodes, model.subgraphs = 3, [schema.BufferT()], [], [graph]
    graph.tensors, graph.operators, graph.inputs = [], [], [0]

    def tensor(name: str, shape: tuple[int, ...], content: np.ndarray | None = None) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name.encode(), list(shape), schema.TensorType.FLOAT32, 0
        if content is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(content).tobytes(), np.uint8)
            model.buffers.append(buffer)
            made.buffer = len(model.buffers) - 1
        graph.tensors.append(made)
        return len(graph.tensors) - 1

    def convolution(name: str, source: int, shape: tuple[int, ...], options: Any, kind: int, same: bool) -> int:
        weights = values[name].transpose((1, 2, 3, 0) if name == "depthwise" else (0, 2, 3, 1))
        operator, code = schema.OperatorT(), schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = kind
        code.version = 1
        model.operatorCodes.append(code)
        operator.opcodeIndex = len(model.operatorCodes) - 1
        bias = values[f"{name}_bias"]
        operator.inputs = [source, tensor(name, weights.shape, weights), tensor(f"{name}_bias", bias.shape, bias)]
        operator.outputs = [tensor(f"{name}_out", shape)]
        options.strideW = options.strideH = options.dilationWFactor = options.dilationHFactor = 1
        options.padding = schema.Padding.SAME if same else schema.Padding.VALID
        kinds = schema.BuiltinOptions
        operator.builtinOptionsType = kinds.DepthwiseConv2DOptions if name == "depthwise" else kinds.Conv2DOptions
        operator.builtinOptions = options
        graph.operators.append(operator)
        return int(operator.outputs[0])

    operators = schema.BuiltinOperator
    at = tensor("input", (1, SIDE, SIDE, 3))
    at = convolution("first", at, (1, SIDE, SIDE, 6), schema.Conv2DOptionsT(), operators.CONV_2D, same=True)
    pad, code = schema.OperatorT(), schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = operators.PAD
    code.version = 1
    model.operatorCodes.append(code)
    around = schema.TensorT()
    around.name, around.shape, around.type = b"around", [4, 2], schema.TensorType.INT32
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(np.array([[0, 0], [1, 1], [1, 1], [0, 0]], np.int32).tobytes(), np.uint8)
    model.buffers.append(buffer)
    around.buffer = len(model.buffers) - 1
    graph.tensors.append(around)
    pad.opcodeIndex, pad.inputs = len(model.operatorCodes) - 1, [at, len(graph.tensors) - 1]
    pad.outputs = [tensor("padded", (1, 10, 10, 6))]
    pad.builtinOptionsType, pad.builtinOptions = schema.BuiltinOptions.PadOptions, schema.PadOptionsT()
    graph.operators.append(pad)
    at = pad.outputs[0]
    depthwise = schema.DepthwiseConv2DOptionsT()
    depthwise.depthMultiplier, depthwise.fusedActivationFunction = 1, schema.ActivationFunctionType.RELU6
    at = convolution("depthwise", at, (1, 8, 8, 6), depthwise, operators.DEPTHWISE_CONV_2D, same=False)
    at = convolution("last", at, (1, 8, 8, 4), schema.Conv2DOptionsT(), operators.CONV_2D, same=True)
    graph.outputs = [at]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
