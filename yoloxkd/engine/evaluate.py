"""Evaluate a detector on a data set: predictions in the original images, and their metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yoloxkd.data.dataset import DetectionData
from yoloxkd.distributed.comm import all_or_none, broadcast, gather_to_main
from yoloxkd.engine.failures import memory_advice
from yoloxkd.errors import UserError
from yoloxkd.instance_masks import encode_rles
from yoloxkd.metrics.coco import COCODetections
from yoloxkd.metrics.measure import measure
from yoloxkd.nms_defaults import CONF, IOU, MAX_DET
from yoloxkd.nn.detector import Detector
from yoloxkd.ops.nms import NMS
from yoloxkd.types import Batch, Detections, Predictor


class TorchPredictor:
    """A `types.Predictor` around a Detector: the network in evaluation mode, then its family's post-processing.

    conf, iou, max_det: of the suppression. During a call every module is in evaluation mode; afterwards each is back in
    the mode it was in. The detector is moved to `device`.
    """

    def __init__(
        self,
        detector: Detector[Any, Any],
        conf: float = CONF,
        iou: float = IOU,
        max_det: int = MAX_DET,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.detector = detector.to(self.device)
        self.nms = NMS(conf, iou, max_det)
        self.names = list(detector.names)
        self.stride = detector.size_multiple
        self.pad_value = detector.spec.input.pad_value

    def __call__(self, images: Tensor) -> list[Detections]:
        """images (B, 3, H, W) uint8 RGB -> one Detections per image, boxes in px of the network input."""
        return self.detections(self.run(self.prepare(images)))

    def prepare(self, images: Tensor) -> Tensor:
        """The images as the network wants them, on its device."""
        return images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    # no inference_mode: what a detector caches in it (point grids) could not be used in training afterwards
    @torch.no_grad()
    def run(self, images: Tensor) -> Any:
        """The network alone: its output."""
        with _evaluating(self.detector):
            return self.detector(images)

    @torch.no_grad()
    def detections(self, out: Any) -> list[Detections]:
        """What `run` gave, as detections."""
        return self.detector.detect(out, self.nms)


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to each module's own mode: frozen norms inside a training model stay frozen."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@dataclass(slots=True)
class EvalResult:
    """Numbers and detections of an evaluation.

    Attributes:
        metrics: the keys of `metrics.coco.coco_metrics`, or for CrowdHuman data of
            `metrics.crowdhuman.crowdhuman_metrics`
        detections: in px of the original images, labels in the data set's order; their image_id is the
            position in `data`
        names: class names of the data set
        images: how many images were evaluated
        seconds: spent in the predictor, reading of images and the metric not counted
        data: the split that was evaluated
        positions: those in `data` of the images that were evaluated, in order
    """

    metrics: dict[str, Any]
    detections: COCODetections
    names: list[str]
    images: int
    seconds: float
    data: DetectionData
    positions: list[int]

    def coco_results(self) -> list[dict[str, Any]]:
        """The detections in COCO's result format, with the annotation file's own ids of images and categories."""
        images, categories = self.data.own_image_ids(), self.data.categories()
        rows: list[dict[str, Any]] = [
            {"image_id": images[image], "category_id": categories[label], "bbox": box, "score": score}
            for image, label, box, score in self._rows()
        ]
        if self.detections.masks is not None:
            for row, image, counts in zip(rows, self.detections.image_id.tolist(), self.detections.masks, strict=True):
                row["segmentation"] = {"size": self.data.sizes[image].tolist(), "counts": counts.decode()}
        return rows

    def odgt_results(self) -> list[dict[str, Any]]:
        """The detections in CrowdHuman's result format, an object an image, named by its file without suffix."""
        boxes_of: dict[int, list[dict[str, Any]]] = {image: [] for image in self.positions}
        for image, _, box, score in self._rows():
            boxes_of[image].append({"box": box, "score": score, "tag": 1})
        out = []
        for image, boxes in boxes_of.items():
            height, width = self.data.sizes[image].tolist()
            name = Path(self.data.paths[image]).stem
            out.append({"ID": name, "width": width, "height": height, "dtboxes": boxes})
        return out

    def _rows(self) -> Iterator[tuple[int, int, list[float], float]]:
        """Position of the image, label, xywh px and score of each detection."""
        d = self.detections
        wh = d.boxes[:, 2:] - d.boxes[:, :2]
        rows = np.concatenate([d.boxes[:, :2], wh], axis=1).astype(np.float64).round(3).tolist()
        scores = d.scores.astype(np.float64).round(6).tolist()
        return zip(d.image_id.tolist(), d.labels.tolist(), rows, scores, strict=True)


def evaluate(
    predictor: Predictor,
    loader: Iterable[Batch],
    data: DetectionData,
    *,
    backend: str = "hotcoco",
    errors: bool = False,
) -> EvalResult:
    """Run a predictor over a loader's letterboxed batches and compare with the ground truth of the images it gave.

    The model's classes are matched to the data set's by name: detections of a class the data set does not have are
    dropped, a class the model does not have has no detections. UserError: no class in common. With `errors` the metrics
    have the error types as well (`metrics.coco.error_types`).

    In a distributed run each process gives every world-th image (`eval_loader` with its rank); they are put in order
    again, so that the numbers are those of one process. Every process gets the metrics, rank zero the detections.
    """
    label_of = _class_map(predictor.names, data.names)
    by_image: dict[int, COCODetections] = {}
    seconds = 0.0
    with all_or_none():  # an image that one process cannot read is told by all: rank zero keeps the log
        for batch in loader:
            started = time.perf_counter()
            predictions = _predicted(predictor, batch.images)
            seconds += time.perf_counter() - started
            for one, meta in zip(predictions, batch.meta, strict=True):
                by_image[meta.index] = _renamed(one.to_image(meta), meta.index, label_of)
    result = None
    of_ranks = gather_to_main((by_image, seconds))
    with all_or_none():
        if of_ranks:
            whole = {image: detections for part, _ in of_ranks for image, detections in part.items()}
            positions = sorted(whole)
            detections = _joined([whole[image] for image in positions])
            slowest = max(spent for _, spent in of_ranks)
            metrics = measure(data, positions, detections, backend, errors)
            result = EvalResult(metrics, detections, list(data.names), len(positions), slowest, data, positions)
    metrics, ids, seconds = broadcast((result.metrics, result.positions, result.seconds) if result else ({}, [], 0.0))
    return result or EvalResult(metrics, COCODetections(), list(data.names), len(ids), seconds, data, ids)


def metrics_of(
    detections: Mapping[int, Detections], names: list[str], data: DetectionData, *, backend: str = "hotcoco"
) -> dict[str, Any]:
    """The metrics of detections that a model of these class names gave: {position in `data`: px of the original image}."""
    label_of = _class_map(names, data.names)
    positions = sorted(detections)
    return measure(data, positions, _joined([_renamed(detections[i], i, label_of) for i in positions]), backend)


def _predicted(predictor: Predictor, images: Tensor) -> list[Detections]:
    number, _, height, width = images.shape
    doing = f"an evaluation of {number} images of {height}x{width} px at a time"
    with memory_advice(doing, "lower --batch or --imgsz"):
        return predictor(images)


def _class_map(model: list[str], data: list[str]) -> np.ndarray:
    """Label of the model -> label of the data set, -1 where it has no such class."""
    at = {name: k for k, name in enumerate(data)}
    labels = np.array([at.get(name, -1) for name in model], dtype=np.int64)
    if not (labels >= 0).any():
        raise UserError(
            f"the model and the data set have no class in common: the model knows {_some(model)}, "
            f"the data set has {_some(data)}; rename the classes in the data YAML or choose another model"
        )
    return labels


def _some(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")


def _renamed(detections: Detections, image: int, label_of: np.ndarray) -> COCODetections:
    labels = label_of[detections.labels]
    rows = labels >= 0
    image_id = np.full(int(rows.sum()), image, dtype=np.int64)
    masks = None if detections.masks is None else encode_rles(detections.masks[rows])
    return COCODetections(image_id, detections.boxes[rows], detections.scores[rows], labels[rows], masks)


def _joined(parts: list[COCODetections]) -> COCODetections:
    if not parts:
        return COCODetections()
    masks = [p.masks for p in parts if p.masks is not None]
    return COCODetections(
        np.concatenate([p.image_id for p in parts]),
        np.concatenate([p.boxes for p in parts]),
        np.concatenate([p.scores for p in parts]),
        np.concatenate([p.labels for p in parts]),
        list(chain.from_iterable(masks)) if len(masks) == len(parts) else None,
    )
