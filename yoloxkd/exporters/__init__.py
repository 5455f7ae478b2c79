"""Export: files for other runtimes, each compared with its model before it is published."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from yoloxkd.errors import UserError
from yoloxkd.table import Table

if TYPE_CHECKING:
    from yoloxkd.data.dataset import DetectionData
    from yoloxkd.exporters.onnx import ExportOptions
    from yoloxkd.exporters.parity import Int8Recipe
    from yoloxkd.exporters.runtime import Session
    from yoloxkd.nn.detector import Detector


class Exporter(Protocol):
    """Writes a file that is checked against its model, and returns its path; see `exporters.parity.export_checked`."""

    def __call__(
        self,
        detector: Detector[Any, Any],
        path: str | Path,
        options: ExportOptions,
        *,
        data: DetectionData,
        int8: Int8Recipe | None = None,
        source_digest: str = "",
        say: Callable[[str], None] | None = None,
    ) -> Path: ...


EXPORTERS: Table[Exporter] = Table(
    "export format",
    {
        "onnx": "yoloxkd.exporters.parity:export_checked",
        "ncnn": "yoloxkd.exporters.ncnn:export_ncnn",
        "tflite": "yoloxkd.exporters.tflite:export_tflite",
        "executorch": "yoloxkd.exporters.executorch:export_executorch",
    },
)
"""Format, as `--format` takes it -> what writes it."""

RUNTIMES: Table[Callable[[Path, int | None], Session]] = Table(
    "runtime",
    {
        "onnxruntime": "yoloxkd.exporters.onnxruntime_session:OnnxRuntimeSession",
        "openvino": "yoloxkd.exporters.openvino_session:OpenVinoSession",
        "ncnn": "yoloxkd.exporters.ncnn_session:NcnnSession",
        "litert": "yoloxkd.exporters.litert_session:LiteRtSession",
        "executorch": "yoloxkd.exporters.executorch_session:ExecuTorchSession",
    },
)
"""Runtime -> function of (file, threads or None for its own choice) that loads a file."""

RUNTIMES_OF = {
    "onnx": ("onnxruntime", "openvino"),
    "ncnn": ("ncnn",),
    "tflite": ("litert",),
    "executorch": ("executorch",),
}
"""Format -> the runtimes that read it, the usual one first."""

LITERT_PYTHON = "YOLOXKD_LITERT_PYTHON"
"""Environment variable: the Python of the environment that has litert-torch, where this one has it not."""
NEEDED = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "pip install yoloxkd"),
    "onnxruntime": (("onnxruntime",), "pip install yoloxkd"),
    "openvino": (("openvino",), "pip install 'yoloxkd[openvino]'"),
    "ncnn": (("ncnn", "pnnx"), "pip install 'yoloxkd[ncnn]'"),
    "tflite": (
        ("ai_edge_litert", "litert_torch"),
        "pip install 'yoloxkd[tflite]', and an environment for the converter: python -m venv litert && "
        f"litert/bin/pip install litert-torch && export {LITERT_PYTHON}=$PWD/litert/bin/python",
    ),
    "litert": (("ai_edge_litert",), "pip install 'yoloxkd[tflite]'"),
    "executorch": (("executorch",), "pip install 'yoloxkd[executorch]'"),
}
"""Format or runtime -> the modules that it needs, and how to install them."""


def check_format(name: str) -> None:
    """UserError: there is no such format, or what it needs is not installed; it lists formats and runtimes, and how to get them."""
    if name in EXPORTERS and not missing(name):
        return
    fault = (
        f"the export format '{name}' lacks {', '.join(missing(name))}"
        if name in EXPORTERS
        else (f"unknown export format '{name}'")
    )
    raise UserError(f"{fault}; formats: {listed(EXPORTERS)}; runtimes of the file: {listed(RUNTIMES)}")


def missing(name: str) -> list[str]:
    """The modules that a format or runtime lacks here."""
    elsewhere = ("litert_torch",) if os.environ.get(LITERT_PYTHON) else ()
    return [m for m in NEEDED.get(name, ((), ""))[0] if m not in elsewhere and find_spec(m) is None]


def listed(table: Table[Any]) -> str:
    """Formats or runtimes, and of each whether it is installed, or how to."""
    return ", ".join(
        f"{name} ({f'not installed: {NEEDED[name][1]}' if missing(name) else 'installed'})" for name in table
    )
