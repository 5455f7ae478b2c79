"""NCNN export: the ONNX graph through pnnx, as `x.param`, `x.bin` and `x.metadata.json`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import UserError
from yoloxkd.exporters.file_description import check_plain, describe_file
from yoloxkd.exporters.int8_search import check_float_layers
from yoloxkd.exporters.layer_steps import LayerSteps
from yoloxkd.exporters.ncnn_int8 import with_int8
from yoloxkd.exporters.onnx import ExportOptions, described_graph, save_checked
from yoloxkd.exporters.parity import Int8Recipe, export_checked
from yoloxkd.exporters.quantized_file import QuantizedFile, steps_of
from yoloxkd.file_kinds import EXPORTED, parts_of
from yoloxkd.nn.detector import Detector

if TYPE_CHECKING:
    from yoloxkd.data.dataset import DetectionData

_COMPLAINTS = re.compile(r"not supported|unsupported|ignore", re.IGNORECASE)
"""pnnx ends with exit status 0 whatever it left out, and only says so."""


def export_ncnn(
    detector: Detector[Any, Any],
    path: str | Path,
    options: ExportOptions,
    *,
    data: DetectionData,
    int8: Int8Recipe | None = None,
    source_digest: str = "",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Export as `export_checked` does, to `x.param` and the files beside it, run in ncnn.

    fp16 is a smaller file; what ncnn computes in is its own choice. UserError: free shapes, NMS in the graph, or an
    operator that pnnx does not translate.
    """
    check_plain(detector, options, "ncnn")
    if int8 is not None:
        check_float_layers(detector, int8.settings)
    checked = partial(export_checked, detector, path, options, data=data, source_digest=source_digest, say=say)
    param, weights = _float_files(detector, options)
    known: dict[str, np.ndarray] = {}

    def write(path: Path, steps: Mapping[str, LayerSteps]) -> Collection[str]:
        text, content, found = with_int8(param, weights, steps, known) if steps else (param, weights, set[str]())
        to_param, to_weights, note = parts_of(path)
        to_param.write_text(text, encoding="utf-8")
        to_weights.write_bytes(content)
        note.write_text(describe_file(detector, options, source_digest), encoding="utf-8")
        return found

    if not options.int8:
        return checked(write=partial(write, steps={}))
    images, settings = (int8.images, int8.settings) if int8 else ([], Quantization())
    steps, known = steps_of(detector, options, images, settings)
    return checked(int8=int8, quantized=QuantizedFile(steps, EXPORTED["ncnn"], write))


def _float_files(detector: Detector[Any, Any], options: ExportOptions) -> tuple[str, bytes]:
    """The text of the `.param` and the content of the `.bin`."""
    graph = described_graph(detector, replace(options, half=False), scaled=options.half, plain=True)
    with tempfile.TemporaryDirectory(prefix="yoloxkd-ncnn-") as name:
        folder = Path(name)
        save_checked(graph, folder / "m.onnx")
        _run_pnnx(folder, half=options.half)
        return (folder / "m.ncnn.param").read_text(encoding="utf-8"), (folder / "m.ncnn.bin").read_bytes()


def _run_pnnx(folder: Path, *, half: bool) -> None:
    import pnnx

    command = [str(pnnx.EXEC_PATH), "m.onnx", f"fp16={int(half)}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    output_lines = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    complaints = [line for line in output_lines if _COMPLAINTS.search(line)]
    made = all((folder / f"m.ncnn.{kind}").is_file() for kind in ("param", "bin"))
    if done.returncode or complaints or not made:
        reason = (complaints or output_lines or ["it said nothing"])[-1]
        raise UserError(f"pnnx cannot translate this model to ncnn: {reason}; --outputs raw has the fewest operators")
