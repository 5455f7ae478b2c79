"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yoloxkd.errors import UserError


class OnnxRuntimeSession:
    """A `runtime.Session`. UserError: not a file that ONNX Runtime can open."""

    def __init__(self, path: Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        source: str | bytes = str(path)
        try:
            str(path).encode()
        except UnicodeEncodeError:  # ONNX Runtime takes names in UTF-8 only
            source = path.read_bytes()
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exception types have no common base
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{path} is not an ONNX file that ONNX Runtime can open: {reason}") from error
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.outputs: list[str] = [output.name for output in self._session.get_outputs()]

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        results: list[np.ndarray] = self._session.run(self.outputs, {"images": images})
        return results
