"""LiteRT (TensorFlow Lite) on the CPU, where it is installed: `pip install yoloxkd[tflite]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yoloxkd.errors import UserError
from yoloxkd.exporters.file_description import archived_description


class LiteRtSession:
    """A `runtime.Session` of a `.tflite`. UserError: LiteRT is not installed, or cannot read the file."""

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise UserError("LiteRT is not installed: pip install 'yoloxkd[tflite]'") from error
        try:
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            interpreter.allocate_tensors()
            self._run = interpreter.get_signature_runner()
        except Exception as error:  # ValueError and RuntimeError, as the fault may be
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise UserError(f"{path} is not a TFLite file that LiteRT can open: {reason}") from error
        description = archived_description(path)
        self.metadata, self.outputs = description.metadata, description.outputs
        self._input = next(iter(self._run.get_input_details()))
        if len(self._run.get_output_details()) != len(self.outputs):
            raise UserError(f"{path} has other outputs than its metadata promises; export the checkpoint again")

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        results = self._run(**{self._input: images})
        return [results[f"output_{i}"] for i in range(len(self.outputs))]
