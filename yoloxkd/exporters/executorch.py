"""ExecuTorch export: the network through XNNPACK's partitioner, as one `.pte`."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoloxkd.errors import UserError
from yoloxkd.exporters.file_description import append_description, check_plain
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import Int8Recipe, export_checked
from yoloxkd.exporters.raw_graph import exported_program
from yoloxkd.nn.detector import Detector

if TYPE_CHECKING:
    from yoloxkd.data.dataset import DetectionData


def export_executorch(
    detector: Detector[Any, Any],
    path: str | Path,
    options: ExportOptions,
    *,
    data: DetectionData,
    int8: Int8Recipe | None = None,
    source_digest: str = "",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Export as `export_checked` does, to `x.pte`, run in ExecuTorch. UserError: fp16, int8, free shapes, or NMS in the graph."""
    check_plain(detector, options, "executorch")
    if options.half or options.int8:
        raise UserError(
            f"format executorch is fp32 alone here, not {options.precision}; tflite has it, or leave it out"
        )
    write = partial(_write, detector, options, source_digest)
    return export_checked(detector, path, options, data=data, source_digest=source_digest, say=say, writers={(): write})


def _write(detector: Detector[Any, Any], options: ExportOptions, source_digest: str, path: Path) -> None:
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program, _ = exported_program(detector, options)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
    append_description(detector, options, source_digest, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The lowering logs to the root logger and prints."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
