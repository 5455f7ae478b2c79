"""Export: files for other runtimes, each compared with its model before it is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
