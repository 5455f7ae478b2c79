"""Export: files for other runtimes, each compared with its model before it is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from yoloxkd.errors import UserError, nearest

if TYPE_CHECKING:
    from yoloxkd.data.dataset import DetectionData
    from yoloxkd.exporters.onnx import ExportOptions
    from yoloxkd.exporters.parity import Int8Recipe
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


def _onnx(
    detector: Detector[Any, Any],
    path: str | Path,
    options: ExportOptions,
    *,
    data: DetectionData,
    int8: Int8Recipe | None = None,
    source_digest: str = "",
    say: Callable[[str], None] | None = None,
) -> Path:
    from yoloxkd.exporters.parity import export_checked  # torch and onnx cost seconds to import

    return export_checked(detector, path, options, data=data, int8=int8, source_digest=source_digest, say=say)


EXPORTERS: dict[str, Exporter] = {
    "onnx": _onnx,
}
"""Format -> what writes it."""


def check_format(name: str) -> str:
    """The name, when it is an export format; UserError otherwise."""
    if name not in EXPORTERS:
        raise UserError(f"unknown export format '{name}': {nearest(name, EXPORTERS)}")
    return name
