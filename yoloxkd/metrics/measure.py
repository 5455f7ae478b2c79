"""Choose the metrics of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from yoloxkd.data.dataset import DetectionData
from yoloxkd.metrics.coco import COCODetections, coco_metrics, error_types
from yoloxkd.metrics.crowdhuman import crowdhuman_metrics


def measure(
    data: DetectionData, images: list[int], detections: COCODetections, backend: str, errors: bool = False
) -> dict[str, Any]:
    """The numbers of detections on `images`: CrowdHuman's AP, MR and JI for data of that format, else COCO's.

    images      positions in the data set; so are the detections' image ids. The data set's own ids do not matter
    errors      whether `errors` holds the detections' error types (`coco.error_types`)
    `per_class` holds, by class name, some of them. `backend` computes the COCO numbers. UserError: as `coco_metrics`.
    """
    crowdhuman = data.format == "crowdhuman"
    truth: dict[str, Any] = {}
    if errors or not crowdhuman:
        whole = replace(data, image_ids=np.arange(len(data)), category_ids=None).ground_truth()
        truth = _restricted(whole, images)
    if crowdhuman:
        metrics = crowdhuman_metrics(data, images, detections)
    else:
        metrics = coco_metrics(truth, detections, names=data.names, backend=backend)
    return metrics | ({"errors": error_types(truth, detections, names=data.names)} if errors else {})


def overall(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers over all classes, by name, in their order."""
    return {name: float(value) for name, value in metrics.items() if name not in ("per_class", "errors")}


def _restricted(ground_truth: dict[str, Any], images: Iterable[int]) -> dict[str, Any]:
    """The ground truth of these images alone: a loader may have given only some of them."""
    wanted = set(images)
    if len(wanted) == len(ground_truth["images"]):
        return ground_truth
    return {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in wanted],
        "annotations": [a for a in ground_truth["annotations"] if a["image_id"] in wanted],
    }
