"""The graph inside a TFLite file, for rewriting it."""

from __future__ import annotations

from typing import Any

import numpy as np

_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "DEQUANTIZE": 3, "PAD": 2}
"""Of the operators, from which on they take int8, and DEQUANTIZE fp16."""


class TfliteGraph:
    """A file's only graph, read with the object interface of TensorFlow Lite's schema.

    operators  in the order in which they run; rewriting replaces them
    kinds      the schema's numbers of operators, by name
    """

    def __init__(self, content: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema: Any = schema
        self.kinds: Any = schema.BuiltinOperator
        self._model = schema.ModelT.InitFromPackedBuf(content, 0)
        self._graph = self._model.subgraphs[0]
        self.tensors: list[Any] = self._graph.tensors
        self.operators: list[Any] = list(self._graph.operators)

    @property
    def outputs(self) -> list[int]:
        """The tensors that the file gives out."""
        return [int(i) for i in self._graph.outputs]

    def kind(self, operator: Any) -> int:
        return int(self._model.operatorCodes[operator.opcodeIndex].builtinCode)

    def is_convolution(self, operator: Any) -> bool:
        return self.kind(operator) in (self.kinds.CONV_2D, self.kinds.DEPTHWISE_CONV_2D)

    def array(self, tensor: int) -> np.ndarray | None:
        """A constant of float32; None: it is something else."""
        one = self.tensors[tensor]
        data = self._model.buffers[one.buffer].data
        if data is None or len(data) == 0 or one.type != self.schema.TensorType.FLOAT32:
            return None
        return np.frombuffer(bytes(bytearray(data)), np.float32).reshape([int(n) for n in one.shape])

    def tensor(self, like: int, kind: int, content: np.ndarray | None = None) -> int:
        """A new tensor of the shape of `like`; content None: it is computed."""
        old = self.tensors[like]
        made = self.schema.TensorT()
        made.shape, made.shapeSignature, made.hasRank = old.shape, old.shapeSignature, old.hasRank
        made.type = kind  # its name comes with the whole file's
        buffer = self.schema.BufferT()
        if content is not None:
            buffer.data = np.frombuffer(np.ascontiguousarray(content).tobytes(), np.uint8)
        self._model.buffers.append(buffer)
        made.buffer = len(self._model.buffers) - 1
        self.tensors.append(made)
        return len(self.tensors) - 1

    def with_steps(self, tensor: int, step: Any, zero: list[int], axis: int = 0) -> int:
        """The tensor, with what its codes mean: one step, or one for each index of an axis."""
        quantization = self.schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = np.asarray(step, np.float32), np.asarray(zero, np.int64)
        quantization.quantizedDimension = axis
        self.tensors[tensor].quantization = quantization
        return tensor

    def with_meaning_of(self, tensor: int, other: int) -> int:
        """The tensor, with codes that mean what those of another mean."""
        self.tensors[tensor].quantization = self.tensors[other].quantization
        return tensor

    def operator(self, kind: int, source: int, target: int) -> Any:
        """A new operator of one input and one output."""
        made = self.schema.OperatorT()
        made.opcodeIndex = self._code(kind)
        made.inputs, made.outputs = [source], [target]
        return made

    def content(self, operators: list[Any]) -> bytes:
        """The file with these operators, without constants that nobody reads any more and with short names inside."""
        import flatbuffers

        self._graph.operators = operators
        for name, version in _VERSIONS.items():
            for code in self._model.operatorCodes:
                if code.builtinCode == getattr(self.kinds, name):
                    code.version = max(code.version, version)
        read = {int(i) for operator in operators for i in operator.inputs}
        kept = {self.tensors[i].buffer for i in read | set(self.outputs)}
        outside = {int(i) for i in self._graph.inputs} | set(self.outputs)
        for index, tensor in enumerate(self.tensors):
            if index not in outside:
                tensor.name = b"%d" % index
        kept |= {entry.buffer for entry in self._model.metadata or []}
        for index, buffer in enumerate(self._model.buffers):
            if index not in kept:
                buffer.data = None
        builder = flatbuffers.Builder(1024)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _code(self, kind: int) -> int:
        for index, code in enumerate(self._model.operatorCodes):
            if code.builtinCode == kind:
                return index
        code = self.schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = kind  # all below 127, up to which the old field is read
        code.version = 1
        self._model.operatorCodes.append(code)
        return len(self._model.operatorCodes) - 1
