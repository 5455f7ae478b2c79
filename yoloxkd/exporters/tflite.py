"""TFLite export: the network through litert-torch, which may live in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from yoloxkd.errors import UserError
from yoloxkd.exporters import LITERT_PYTHON, check_format
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.edge_form import edge_form, scaled_input
from yoloxkd.exporters.file_description import check_plain, describe_file
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import Int8Recipe, export_checked
from yoloxkd.exporters.raw_graph import RawHead
from yoloxkd.file_kinds import TFLITE_NOTE
from yoloxkd.nn.detector import Detector

if TYPE_CHECKING:
    from yoloxkd.data.dataset import DetectionData


def export_tflite(
    detector: Detector[Any, Any],
    path: str | Path,
    options: ExportOptions,
    *,
    data: DetectionData,
    int8: Int8Recipe | None = None,
    source_digest: str = "",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Export as `export_checked` does, to `x.tflite`, run in LiteRT; its metadata are appended as a zip archive.

    UserError: free shapes, NMS in the graph, or litert-torch refuses.
    """
    check_plain(detector, options, "tflite")
    if options.int8:
        raise UserError("format tflite has no int8 here yet; leave --int8 out")
    write = partial(_write, detector, options, source_digest)
    return export_checked(detector, path, options, data=data, source_digest=source_digest, say=say, write=write)


def _write(detector: Detector[Any, Any], options: ExportOptions, source_digest: str, path: Path) -> None:
    network = Exportable(detector)
    edge_form(network.detector)
    if options.half:
        scaled_input(network.detector)
    module: torch.nn.Module = RawHead(network) if options.raw else network
    sample = torch.full((1, 3, options.imgsz, options.imgsz), 114.0)
    with tempfile.TemporaryDirectory(prefix="yoloxkd-tflite-") as name, torch.no_grad():
        folder = Path(name)
        program = torch.export.export(module.eval(), (sample,)).run_decompositions({})
        torch.export.save(program, folder / "m.pt2")
        _convert(folder, "fp16" if options.half else "fp32")
        path.write_bytes((folder / "m.tflite").read_bytes())
    with zipfile.ZipFile(path, "a") as archive:  # the format's own way to carry further files
        archive.writestr(TFLITE_NOTE, describe_file(detector, options, source_digest))


def _convert(folder: Path, precision: str) -> None:
    script = Path(__file__).with_name("tflite_converter.py").read_text(encoding="utf-8")
    check_format("tflite")
    python = os.environ.get(LITERT_PYTHON) or sys.executable
    try:
        done = subprocess.run(
            [python, "-c", script, precision], cwd=folder, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise UserError(f"{LITERT_PYTHON}: {python} cannot be started: {error.strerror or error}") from error
    if done.returncode or not (folder / "m.tflite").is_file():
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"litert-torch (of {python}) cannot convert this model: {reason}")
