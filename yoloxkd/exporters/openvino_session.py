"""OpenVINO on the CPU, where it is installed: `pip install yoloxkd[openvino]`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.errors import UserError


@cache
def _core() -> Any:
    """The one of this process, kept to its end.

    Each core gives the thread a signal stack of its own and takes it away when it goes. Of two that go in the order in which they
    came, the second restores the first one's, which is no longer there, and the next signal ends the process (2026.4.1).
    """
    import openvino

    return openvino.Core()


class OpenVinoSession:
    """A `runtime.Session`, computing in float32. UserError: OpenVINO is not installed, or cannot read the file."""

    def __init__(self, path: Path, threads: int | None) -> None:
        import onnx

        try:
            core = _core()
        except ImportError as error:
            raise UserError("OpenVINO is not installed: pip install 'yoloxkd[openvino]'") from error
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            file = onnx.load(str(path), load_external_data=False)
            self._model = core.compile_model(str(path), "CPU", settings)
        except Exception as error:  # protobuf's and OpenVINO's exception types have no common base
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{path} is not an ONNX file that OpenVINO can open: {reason}") from error
        self.metadata = {entry.key: entry.value for entry in file.metadata_props}
        self.outputs = [output.name for output in file.graph.output]

    def run(self, images: np.ndarray) -> Sequence[np.ndarray]:
        results = self._model({"images": images})
        return [results[name] for name in self.outputs]
