"""ExecuTorch export: the network lowered to XNNPACK, as `x.pte`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import UserError
from yoloxkd.exporters import check_format
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.coded_form import codable, coded_form
from yoloxkd.exporters.edge_form import edge_form
from yoloxkd.exporters.file_description import append_description, check_plain
from yoloxkd.exporters.int8 import Locations
from yoloxkd.exporters.int8_search import check_float_layers
from yoloxkd.exporters.layer_steps import LayerSteps, rounded_form
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import Int8Recipe, export_checked
from yoloxkd.exporters.quantized_file import QuantizedFile, Write, steps_of
from yoloxkd.exporters.raw_graph import exported_program
from yoloxkd.file_kinds import EXPORTED
from yoloxkd.nn.detector import Detector

if TYPE_CHECKING:
    from torch.export import ExportedProgram

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
    """Export as `export_checked` does, to `x.pte`, run in ExecuTorch; its metadata are appended as a zip archive.

    UserError: fp16, free shapes, NMS in the graph, or ExecuTorch is not installed or refuses the model.
    """
    check_plain(detector, options, "executorch")
    if options.half:
        raise UserError(
            "there is no fp16 in format executorch: XNNPACK took none of a YOLOX, whose file was not smaller; leave --half out"
        )
    if int8 is not None:
        check_float_layers(detector, int8.settings)
    check_format("executorch")
    checked = partial(export_checked, detector, path, options, data=data, source_digest=source_digest, say=say)

    def write(path: Path, steps: Mapping[str, LayerSteps]) -> Collection[str]:
        path.write_bytes(_lowered(exported_program(detector, options, steps)))
        append_description(detector, options, source_digest, path)
        return codable(detector, steps)

    if not options.int8:
        return checked(write=partial(write, steps={}))
    images, settings = (int8.images, int8.settings) if int8 else ([], Quantization())
    steps, _ = steps_of(detector, options, images, settings)
    return checked(int8=int8, quantized=_SimulatedFile(detector, steps, write))


class _SimulatedFile(QuantizedFile):
    """A `QuantizedFile` whose layers are ranked by the network in PyTorch: a file is lowered for minutes, and computes the same."""

    def __init__(self, detector: Detector[Any, Any], steps: Mapping[str, LayerSteps], write: Write) -> None:
        super().__init__(steps, EXPORTED["executorch"], write)
        self._detector = detector

    @torch.no_grad()
    def outputs(self, in_float: Collection[str] | None, images: Sequence[np.ndarray]) -> list[Locations]:
        """See `sensitivity.Int8Maker`."""
        network = Exportable(self._detector)
        rounded_form(network.detector)
        edge_form(network.detector)
        coded_form(network.detector, self.wanted(self.layers if in_float is None else in_float))
        found = [network(torch.from_numpy(image).float()) for image in images]
        return [(boxes[0].numpy(), scores[0].numpy()) for boxes, scores in found]


def _lowered(program: ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    try:
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        content: bytes = edge.to_executorch().buffer
    except Exception as error:  # its passes raise what they like
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"ExecuTorch cannot lower this model: {reason}") from error
    return content
