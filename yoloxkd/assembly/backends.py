"""Backends of `Detector`: a PyTorch model, or an exported file in a runtime."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch

from yoloxkd.assembly.models import Opened, open_model
from yoloxkd.assembly.prediction import default_size
from yoloxkd.assembly.run import check_size
from yoloxkd.engine.device import choose_device
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.errors import UserError
from yoloxkd.exporters import RUNTIMES, RUNTIMES_OF
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.file_kinds import exported_format
from yoloxkd.types import ImageSize, Predictor

logger = logging.getLogger("yoloxkd")


class Backend(ABC):
    """What a `Detector` computes with.

    Attributes:
        exported: whether it is an exported file.
        source: file or name, as the user gave it.
        file: the file the model came from.
        device: where it computes.
        names: class names, by label.
        stride: px; sides of an input are multiples of it.
        imgsz: px, the input size it was trained or exported for.
        pad_value: RGB 0..255 of padding.
        precision: fp32, fp16 or int8.
        masks: whether it gives instance masks.
    """

    exported: ClassVar[bool]
    source: str
    file: Path
    device: torch.device
    names: list[str]
    stride: int
    imgsz: ImageSize
    pad_value: tuple[int, int, int]
    precision: str
    masks: bool = False

    @abstractmethod
    def predictor(self, conf: float, iou: float, max_det: int) -> Predictor:
        """What turns a batch of inputs into detections above `conf` after NMS at IoU `iou`, at most `max_det` an image."""

    @abstractmethod
    def opened(self, otherwise: str) -> Opened:
        """The PyTorch model and its weights. UserError: there is none; the sentence ends with `otherwise`."""

    def check_size(self, size: ImageSize, rect: bool) -> None:
        """UserError: inputs of this size (px), or of each image's own shape (`rect`), cannot be taken."""
        check_size(size, self.stride)


class TorchBackend(Backend):
    """A checkpoint, or a named model with its published weights, in PyTorch."""

    exported = False

    def __init__(self, source: str, device: str) -> None:
        self.source, self.device = source, choose_device(device)
        self._opened = open_model(source)
        if not self._opened.report.complete:
            logger.warning("%s: %s", source, self._opened.report.describe())
        detector = self._opened.detector.to(self.device)
        self.precision = "fp32" if self._opened.weights.quantize is None else "int8"
        self.file = self._opened.weights.path
        self.names, self.stride = list(detector.names), detector.size_multiple
        self.imgsz = self._opened.weights.imgsz or default_size(self._opened.name)
        self.pad_value, self.masks = detector.spec.input.pad_value, detector.spec.masks

    def predictor(self, conf: float, iou: float, max_det: int) -> Predictor:
        return TorchPredictor(self._opened.detector, conf=conf, iou=iou, max_det=max_det, device=self.device)

    def opened(self, otherwise: str) -> Opened:
        return self._opened


class ExportedBackend(Backend):
    """An exported file in a runtime of `RUNTIMES`, on the CPU."""

    exported = True

    def __init__(self, source: str, device: str) -> None:
        readers = RUNTIMES_OF[exported_format(source) or "onnx"]
        if device in RUNTIMES and device not in readers:
            raise UserError(
                f"--device {device} does not read {source}; {' and '.join(readers)} can, leave --device out"
            )
        if device not in RUNTIMES and device not in ("auto", "cpu"):
            raise UserError(f"{source} is an exported file, which runs on the CPU: leave --device {device} out")
        runtime = device if device in RUNTIMES else readers[0]
        self.source, self.file = source, Path(source)
        self.device = choose_device("cpu")
        self._runtime = OnnxPredictor(source, runtime=runtime)
        self.names, self.stride, self.imgsz = self._runtime.names, self._runtime.stride, self._runtime.imgsz
        self.pad_value, self.masks = self._runtime.pad_value, self._runtime.masks
        self.precision = self._runtime.metadata.get("precision", "fp32")

    def predictor(self, conf: float, iou: float, max_det: int) -> Predictor:
        return self._runtime.tuned(conf, iou, max_det)

    def opened(self, otherwise: str) -> Opened:
        raise UserError(f"{self.source} is an exported file{otherwise}")

    def check_size(self, size: ImageSize, rect: bool) -> None:
        super().check_size(size, rect)
        if self._runtime.dynamic_size:
            return
        if rect or isinstance(size, tuple):
            raise UserError(
                f"{self.source} takes inputs of {self.imgsz}x{self.imgsz} px alone; for inputs of other shapes "
                "export it again with --dynamic"
            )
        if size != self.imgsz:
            raise UserError(f"{self.source} was exported for {self.imgsz} px; export it again with --imgsz {size}")


def open_backend(source: str, device: str) -> Backend:
    """The backend for a file or model name; `device` is a torch device or, for an exported file, a runtime.

    Raises:
        UserError: the source or the device cannot be used.
    """
    return ExportedBackend(source, device) if exported_format(source) is not None else TorchBackend(source, device)
