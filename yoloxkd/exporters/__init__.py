"""Export: detectors as files that other runtimes read, each compared with the model before it is given out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yoloxkd.errors import UserError, nearest


def _onnx(*args: Any, **options: Any) -> Path:
    from yoloxkd.exporters.parity import export_checked  # torch and onnx cost seconds to import

    return export_checked(*args, **options)


EXPORTERS: dict[str, Callable[..., Path]] = {
    "onnx": _onnx,
}
"""Format -> function of (detector, path, options, ...) that writes a checked file and returns its path."""


def check_format(name: str) -> str:
    """The name, when it is an export format; UserError otherwise."""
    if name not in EXPORTERS:
        raise UserError(f"unknown export format '{name}': {nearest(name, EXPORTERS)}")
    return name
