"""TFLite export: the network through litert-torch, which may live in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import UserError
from yoloxkd.exporters import LITERT_PYTHON, check_format
from yoloxkd.exporters.file_description import append_description, check_plain
from yoloxkd.exporters.int8_search import named_layers
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import Int8Recipe, export_checked
from yoloxkd.exporters.raw_graph import exported_program
from yoloxkd.nn.detector import Detector

if TYPE_CHECKING:
    from yoloxkd.data.dataset import DetectionData

SENSITIVE = 3
"""Convolutions at the start that lose most by int8: measured on YOLOX-nano, docs/quantization.md."""
OTHERS = "all operators but convolutions"


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

    In int8 everything is quantized, weights a channel and activations a tensor, by ranges of the calibration images; where
    that fails the gate, the first three convolutions stay float32, unless `int8.settings.float_layers` says which, and
    then all that is no convolution.
    UserError: free shapes, NMS in the graph, another setting of int8, or litert-torch refuses.
    """
    check_plain(detector, options, "tflite")
    options.check(detector)
    with tempfile.TemporaryDirectory(prefix="yoloxkd-tflite-") as name:
        folder = Path(name)
        convolutions = _save_program(detector, options, folder)
        choices: list[tuple[str, ...]] = [()]
        if int8 is not None:
            choices = _float_layers(int8.settings, convolutions)
            np.save(folder / "images.npy", np.concatenate(int8.images).astype(np.float32))
        writers = {kept: partial(_write, detector, options, source_digest, folder, kept) for kept in choices}
        return export_checked(
            detector, path, options, data=data, int8=int8, source_digest=source_digest, say=say, writers=writers
        )


def _float_layers(settings: Quantization, convolutions: Sequence[str]) -> list[tuple[str, ...]]:
    """What is kept in float32, tried one after the other."""
    if others := sorted(settings.model_fields_set - {"float_layers", "images"}):
        raise UserError(
            f"export.{others[0]} is of ONNX files; an int8 file of format tflite takes export.float_layers and export.images"
        )
    if settings.float_layers is None:
        first = tuple(convolutions[:SENSITIVE])
        return [(), first, (*first, OTHERS)]
    named = tuple(named_layers(convolutions, settings.float_layers))
    return [named, (*named, OTHERS)]


def _save_program(detector: Detector[Any, Any], options: ExportOptions, folder: Path) -> list[str]:
    """Write the network as `m.pt2`; returns the names of its convolutions, in the order of the modules."""
    program, network = exported_program(detector, options)
    torch.export.save(program, folder / "m.pt2")
    return [name for name, layer in network.detector.named_modules() if isinstance(layer, torch.nn.Conv2d)]


def _write(
    detector: Detector[Any, Any],
    options: ExportOptions,
    source_digest: str,
    folder: Path,
    float_layers: Sequence[str],
    path: Path,
) -> None:
    kept = [layer for layer in float_layers if layer != OTHERS]
    _convert(folder, "int8-convolutions" if OTHERS in float_layers else options.precision, kept)
    path.write_bytes((folder / "m.tflite").read_bytes())
    append_description(detector, options, source_digest, path)


def _convert(folder: Path, precision: str, float_layers: Sequence[str]) -> None:
    """Run the converter's program in `folder`."""
    script = Path(__file__).with_name("tflite_converter.py").read_text(encoding="utf-8")
    check_format("tflite")
    python = os.environ.get(LITERT_PYTHON) or sys.executable
    command = [python, "-c", script, precision, *float_layers]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UserError(f"{LITERT_PYTHON}: {python} cannot be started: {error.strerror or error}") from error
    if done.returncode or not (folder / "m.tflite").is_file():
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"litert-torch (of {python}) cannot convert this model: {reason}")
