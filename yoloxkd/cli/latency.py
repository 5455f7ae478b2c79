"""Latency of a prediction and of its parts, with the variants interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from yoloxkd.assembly.prediction import one_input
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.types import Detections

Timed = OnnxPredictor | TorchPredictor
Candidates = tuple[Tensor, Tensor, tuple[int, ...]]
"""Boxes, scores, and how many of them each feature level has."""
WARM_UP = 3


class CompiledPredictor(TorchPredictor):
    """A TorchPredictor whose network went through torch.compile."""

    def compiled(self) -> CompiledPredictor:
        self.detector.eval()
        self._network: Callable[[Tensor], Candidates] = torch.compile(self._candidates)
        return self

    def _candidates(self, images: Tensor) -> Candidates:
        out = self.detector(images)
        return *self.detector.candidates(out), self.detector.level_sizes(out)

    @torch.no_grad()
    def run(self, images: Tensor) -> Candidates:
        return self._network(images)

    def detections(self, out: Candidates) -> list[Detections]:
        return self.detector.after_nms(*out, self.nms)


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds an image, of every repetition: before the network, in it, after it, each (runs,)."""

    before: np.ndarray
    network: np.ndarray
    after: np.ndarray

    @property
    def total(self) -> np.ndarray:
        total: np.ndarray = self.before + self.network + self.after
        return total

    def summary(self) -> dict[str, float]:
        """Medians in ms; of the total also the 10th and 90th percentile, and the share above the network alone."""
        parts = {"before": self.before, "network": self.network, "after": self.after, "total": self.total}
        out = {f"{name}_ms": round(1000 * float(np.median(values)), 3) for name, values in parts.items()}
        low, high = (round(1000 * float(v), 3) for v in np.percentile(self.total, [10, 90]))
        return out | {"total_p10_ms": low, "total_p90_ms": high, "end_to_end": round(end_to_end(self), 3)}


def end_to_end(latency: Latency) -> float:
    """Whole prediction over the network alone, medians."""
    return float(np.median(latency.total) / np.median(latency.network))


def measure_latency(
    predictors: Mapping[str, Timed], image: np.ndarray, imgsz: int, runs: int, threads: int
) -> dict[str, Latency]:
    """Latency of each predictor on one image (h, w, 3) uint8, one at a time, in turns so that all meet the same load.

    threads: of torch and OpenCV; an OnnxPredictor has its own from when it was made.
    """
    with limited_threads(threads):
        for predictor in predictors.values():
            for _ in range(WARM_UP):
                _time_parts(predictor, image, imgsz)
        rows = [[_time_parts(predictor, image, imgsz) for predictor in predictors.values()] for _ in range(runs)]
    times = np.array(rows)  # (runs, predictors, 3)
    return {name: Latency(*times[:, i].T) for i, name in enumerate(predictors)}


def _time_parts(predictor: Timed, image: np.ndarray, imgsz: int) -> tuple[float, float, float]:
    """Seconds of the three parts of `Detector.predict`."""
    started = time.perf_counter()
    images, meta = one_input(image, imgsz, predictor)
    if isinstance(predictor, OnnxPredictor):
        pixels = predictor.prepare(images)
        ready = time.perf_counter()
        outputs = predictor.run(pixels)
        done = time.perf_counter()
        detections = predictor.detections(outputs)[0]
    else:
        prepared = predictor.prepare(images)
        ready = _now(predictor.device)
        out = predictor.run(prepared)
        done = _now(predictor.device)
        detections = predictor.detections(out)[0]
    detections.to_image(meta)
    return ready - started, done - ready, time.perf_counter() - done


def _now(device: torch.device) -> float:
    """The time when the device has done all it was given: CUDA returns before its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """torch and OpenCV on so many threads, and back."""
    before: tuple[int, Any] = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
