"""Export: files for other runtimes, each compared with its model before it is published."""

from __future__ import annotations

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


EXPORTERS: Table[Exporter] = Table("export format", {"onnx": "yoloxkd.exporters.parity:export_checked"})
"""Format, as `--format` takes it -> what writes it."""

RUNTIMES: Table[Callable[[Path, int | None], Session]] = Table(
    "runtime",
    {
        "onnxruntime": "yoloxkd.exporters.onnxruntime_session:OnnxRuntimeSession",
        "openvino": "yoloxkd.exporters.openvino_session:OpenVinoSession",
    },
)
"""Runtime -> function of (file, threads or None for its own choice) that loads a file."""

NEEDED = {
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "pip install yoloxkd"),
    "onnxruntime": (("onnxruntime",), "pip install yoloxkd"),
    "openvino": (("openvino",), "pip install 'yoloxkd[openvino]'"),
}
"""Format or runtime -> the modules that it needs, and how to install them."""


def check_format(name: str) -> None:
    """UserError: there is no such format, or what it needs is not installed; it lists formats and runtimes, and how to get them."""
    if name in EXPORTERS and not _missing(name):
        return
    fault = (
        f"the export format '{name}' lacks {', '.join(_missing(name))}"
        if name in EXPORTERS
        else (f"unknown export format '{name}'")
    )
    raise UserError(f"{fault}; formats: {_listed(EXPORTERS)}; runtimes of the file: {_listed(RUNTIMES)}")


def _missing(name: str) -> list[str]:
    return [module for module in NEEDED.get(name, ((), ""))[0] if find_spec(module) is None]


def _listed(table: Table[Any]) -> str:
    return ", ".join(
        f"{name} ({f'not installed: {NEEDED[name][1]}' if _missing(name) else 'installed'})" for name in table
    )
