"""Detections of several models against the ground truth, and the images where they differ most (PGD Figure 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.loader import eval_loader
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.explain.scene import Model
from yoloxkd.kd.pairing import match_classes
from yoloxkd.types import Detections, ImageSize

BATCH = 8
IOU = 0.5
"""A detection is right from this IoU on, as in AP50."""


@dataclass(frozen=True, slots=True)
class DetectionScore:
    """Detections of an image against its objects.

    Attributes:
        right: (n,) bool, detections that have an object of their class at an IoU of at least 0.5
        iou: (g,) float64, of each object with its detection, 0 where it is missed
    """

    right: np.ndarray
    iou: np.ndarray

    @property
    def false(self) -> int:
        """Detections without an object."""
        return int((~self.right).sum())

    @property
    def missed(self) -> int:
        """Objects without a detection."""
        return int((self.iou == 0).sum())


def score_detections(detections: Detections, boxes: np.ndarray, labels: np.ndarray) -> DetectionScore:
    """Give every detection, best score first, the free object of its class with the highest IoU.

    Args:
        detections: of the image, with labels in the order of `labels`
        boxes: (g, 4) xyxy px, objects; labels (g,)
    """
    right, iou = np.zeros(len(detections), bool), np.zeros(len(boxes))
    overlap = _iou(detections.boxes.astype(np.float64), boxes.astype(np.float64))
    overlap[detections.labels[:, None] != labels[None]] = 0.0
    for row in np.argsort(-detections.scores, kind="stable"):
        free = np.where(iou == 0, overlap[row], 0.0)
        if len(boxes) and free.max() >= IOU:
            right[row], iou[free.argmax()] = True, free.max()
    return DetectionScore(right, iou)


def difference(one: DetectionScore, other: DetectionScore) -> float:
    """How differently two models see an image: differences of the objects' IoU, and of the number of false detections."""
    return float(np.abs(one.iou - other.iou).sum() + abs(one.false - other.false))


def most_different(scores: Sequence[Sequence[DetectionScore]], count: int) -> list[int]:
    """The images where models differ most from the first model, most different first; ties in their order.

    Args:
        scores: for each image: of each model
        count: how many, at most
    """
    apart = [sum(difference(models[0], other) for other in models[1:]) for models in scores]
    return sorted(range(len(scores)), key=lambda image: -apart[image])[:count]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4), (g, 4) xyxy -> (n, g)"""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    area = [(box[:, 2:] - box[:, :2]).clip(0).prod(-1) for box in (a, b)]
    union: np.ndarray = (area[0][:, None] + area[1][None] - common).clip(1e-9)
    overlap: np.ndarray = common / union
    return overlap


def detect_all(
    model: Model, data: DetectionData, size: ImageSize, conf: float, device: torch.device | str = "cpu"
) -> list[Detections]:
    """The detections of a model in each image of a split, in px of that image, with labels and names of the data set.

    Args:
        size: px of the network input
        conf: least score

    Raises:
        UserError: the model knows no class of the data set, or an image cannot be read.
    """
    model.classes(data.names)
    label_of = match_classes(model.detector.names, data.names).numpy()
    predictor = TorchPredictor(model.detector, conf=conf, device=device)
    loader = eval_loader(data, imgsz=size, batch=BATCH, multiple=predictor.stride, pad_value=predictor.pad_value)
    detections: dict[int, Detections] = {}
    for batch in loader:
        for one, meta in zip(predictor(batch.images), batch.meta, strict=True):
            here = one.to_image(meta)
            labels = label_of[here.labels]
            rows = labels >= 0
            detections[meta.index] = Detections(here.boxes[rows], here.scores[rows], labels[rows], list(data.names))
    return [detections[index] for index in range(len(data))]
