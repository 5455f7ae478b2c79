"""int8 files of formats other than ONNX: the file of float32, with the numbers of chosen convolutions put into it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import UserError
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.edge_form import edge_form
from yoloxkd.exporters.int8 import Int8Quantizer, Locations
from yoloxkd.exporters.layer_steps import (
    WEIGHT_MOST,
    LayerSteps,
    all_weights,
    calibrated_steps,
    rounded_form,
    with_weights_of,
)
from yoloxkd.exporters.onnx import ExportOptions, described_graph
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import quantized_layers

Write = Callable[[Path, Mapping[str, LayerSteps]], Collection[str]]
"""(path, steps of the layers that become int8) -> names of those that are in the file, which lies there then."""


class QuantizedFile:
    """A `sensitivity.Int8Maker` of files, run in their own runtime.

    layers  names of the convolutions that may be int8
    lost    those of them that were asked for and not found in the file: they are in float32
    """

    def __init__(self, steps: Mapping[str, LayerSteps], ending: str, write: Write) -> None:
        self.layers = list(steps)
        self.lost: set[str] = set()
        self._steps, self._ending, self._write = steps, ending, write

    def wanted(self, in_float: Collection[str]) -> dict[str, LayerSteps]:
        """The steps of all layers but these."""
        return {name: one for name, one in self._steps.items() if name not in in_float}

    def write(self, path: Path, in_float: Collection[str] = ()) -> None:
        """The file, with the layers of these names left in float32. UserError: all are wanted in int8, and none is in it."""
        wanted = self.wanted(in_float)
        found = set(self._write(path, wanted))
        if wanted and len(wanted) == len(self.layers) and not found:
            raise UserError(
                "the format's converter changed every convolution, so that none can be int8; leave --int8 out"
            )
        self.lost |= wanted.keys() - found

    def outputs(self, in_float: Collection[str] | None, images: Sequence[np.ndarray]) -> list[Locations]:
        """See `sensitivity.Int8Maker`."""
        with tempfile.TemporaryDirectory(prefix="yoloxkd-int8-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / f"x{self._ending}"
            self.write(path, self.layers if in_float is None else in_float)
            predictor = OnnxPredictor(path)
            found = [predictor.locations(predictor.run(image)) for image in images]
        return [(boxes[0], scores[0]) for boxes, scores in found]


def steps_of(
    detector: Detector[Any, Any], options: ExportOptions, images: Sequence[np.ndarray], settings: Quantization
) -> tuple[dict[str, LayerSteps], dict[str, np.ndarray]]:
    """The numbers of every layer that may be int8: those of a model trained for int8, else of ranges on calibration images.

    images  (1, 3, H, W) arrays, RGB 0..255, letterboxed; not looked at for a model trained for int8
    Returns them and the weights of all convolutions, both as they stand in a float32 file.
    """
    edge = Exportable(detector)
    if quantized_layers(detector):
        steps = rounded_form(edge.detector)
        return with_weights_of(edge_form(edge.detector), steps), all_weights(edge.detector)
    edge_form(edge.detector)
    ranges = Int8Quantizer(described_graph(detector, replace(options, half=False)), images, settings).ranges()
    most = WEIGHT_MOST // 2 if settings.reduce_range else WEIGHT_MOST
    return calibrated_steps(edge.detector, ranges, most), all_weights(edge.detector)
