"""TFLite export: the network through litert-torch, which may live in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import UserError
from yoloxkd.exporters import LITERT_PYTHON, check_format
from yoloxkd.exporters.file_description import append_description, check_plain
from yoloxkd.exporters.int8_search import check_float_layers
from yoloxkd.exporters.layer_steps import LayerSteps
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import Int8Recipe, export_checked
from yoloxkd.exporters.quantized_file import QuantizedFile, steps_of
from yoloxkd.exporters.raw_graph import exported_program
from yoloxkd.exporters.tflite_half import with_half_weights
from yoloxkd.exporters.tflite_int8 import with_int8
from yoloxkd.file_kinds import EXPORTED
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

    fp16 is a smaller file, computed in float32. UserError: free shapes, NMS in the graph, or litert-torch refuses.
    """
    check_plain(detector, options, "tflite")
    if int8 is not None:
        check_float_layers(detector, int8.settings)
    checked = partial(export_checked, detector, path, options, data=data, source_digest=source_digest, say=say)
    content = _float_file(detector, options)
    if options.half:
        content = with_half_weights(content)

    def write(path: Path, steps: Mapping[str, LayerSteps]) -> Collection[str]:
        made, found = with_int8(content, steps) if steps else (content, set[str]())
        path.write_bytes(made)
        append_description(detector, options, source_digest, path)
        return found

    if not options.int8:
        return checked(write=partial(write, steps={}))
    steps, _ = steps_of(detector, options, int8.images if int8 else [], int8.settings if int8 else Quantization())
    return checked(int8=int8, quantized=QuantizedFile(steps, EXPORTED["tflite"], write))


def _float_file(detector: Detector[Any, Any], options: ExportOptions) -> bytes:
    with tempfile.TemporaryDirectory(prefix="yoloxkd-tflite-") as name:
        folder = Path(name)
        torch.export.save(exported_program(detector, options), folder / "m.pt2")
        _convert(folder)
        return (folder / "m.tflite").read_bytes()


def _convert(folder: Path) -> None:
    """Run the converter's program in `folder`."""
    script = Path(__file__).with_name("tflite_converter.py").read_text(encoding="utf-8")
    check_format("tflite")
    python = os.environ.get(LITERT_PYTHON) or sys.executable
    command = [python, "-c", script]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UserError(f"{LITERT_PYTHON}: {python} cannot be started: {error.strerror or error}") from error
    if done.returncode or not (folder / "m.tflite").is_file():
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"litert-torch (of {python}) cannot convert this model: {reason}")
