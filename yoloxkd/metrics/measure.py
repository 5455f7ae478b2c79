"""Which numbers a data set is measured by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from yoloxkd.data.records import DetectionData
from yoloxkd.metrics.coco import COCODetections, coco_metrics
from yoloxkd.metrics.crowdhuman import crowdhuman_metrics


def measure(data: DetectionData, image_ids: list[int], detections: COCODetections, backend: str) -> dict[str, Any]:
    """The numbers of detections on the images `image_ids`: CrowdHuman's AP, MR and JI for data of that format, else COCO's.

    `per_class` holds, by class name, some of them. `backend` computes the COCO numbers. UserError: as `coco_metrics`.
    """
    if data.format == "crowdhuman":
        return crowdhuman_metrics(data, image_ids, detections)
    return coco_metrics(_restricted(data.ground_truth(), image_ids), detections, names=data.names, backend=backend)


def overall(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers over all classes, by name, in their order."""
    return {name: float(value) for name, value in metrics.items() if name != "per_class"}


def _restricted(ground_truth: dict[str, Any], image_ids: Iterable[int]) -> dict[str, Any]:
    """The ground truth of these images alone: a loader may have given only some of them."""
    wanted = set(image_ids)
    if len(wanted) == len(ground_truth["images"]):
        return ground_truth
    return {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in wanted],
        "annotations": [a for a in ground_truth["annotations"] if a["image_id"] in wanted],
    }
