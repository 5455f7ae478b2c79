"""Choose the metrics of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from yoloxkd.data.dataset import DetectionData
from yoloxkd.errors import UserError, nearest
from yoloxkd.metrics.coco import METRIC_NAMES, COCODetections, coco_metrics, error_types
from yoloxkd.metrics.crowdhuman import CROWDHUMAN_NAMES, crowdhuman_metrics

MASK = "mask_"
"""What the names of the numbers of masks begin with."""
SMALLER_IS_BETTER = ("MR",)


def measure(
    data: DetectionData, images: list[int], detections: COCODetections, backend: str, errors: bool = False
) -> dict[str, Any]:
    """The numbers of detections on `images`: CrowdHuman's AP, MR and JI for data of that format, else COCO's.

    Where both data and detections have masks, COCO's numbers of these are there too, as mask_AP, mask_AP50 and so on.
    images      positions in the data set; so are the detections' image ids. The data set's own ids do not matter
    errors      whether `errors` holds the detections' error types (`coco.error_types`)
    `per_class` holds, by class name, some of them. `backend` computes the COCO numbers. UserError: as `coco_metrics`.
    """
    crowdhuman = data.format == "crowdhuman"
    truth: dict[str, Any] = {}
    if errors or not crowdhuman:
        whole = replace(data, image_ids=np.arange(len(data)), category_ids=None).ground_truth()
        truth = _restrict(whole, images)
    if crowdhuman:
        metrics = crowdhuman_metrics(data, images, detections)
    else:
        metrics = coco_metrics(truth, detections, names=data.names, backend=backend)
    if errors:
        metrics["errors"] = error_types(truth, detections, names=data.names)
    if crowdhuman or data.masks is None or detections.masks is None:
        return metrics
    return _with_masks(metrics, whole, data, images, detections, backend)


def _with_masks(
    metrics: dict[str, Any],
    truth: dict[str, Any],
    data: DetectionData,
    images: list[int],
    detections: COCODetections,
    backend: str,
) -> dict[str, Any]:
    """The numbers of boxes, and after them those of masks."""
    assert data.masks is not None
    for row, segmentation in zip(truth["annotations"], data.masks.segmentations(), strict=True):
        row["segmentation"] = segmentation
    masks = coco_metrics(_restrict(truth, images), detections, names=data.names, backend=backend, kind="segm")
    classes = {name: {**values, **_of_masks(masks["per_class"][name])} for name, values in metrics["per_class"].items()}
    return {**metrics, **_of_masks(overall(masks)), "per_class": classes}


def _of_masks(numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{MASK}{name}": value for name, value in numbers.items()}


def overall(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers over all classes, by name, in their order."""
    return {name: float(value) for name, value in metrics.items() if name not in ("per_class", "errors")}


def check_choice(name: str, data: DetectionData, masks: bool) -> None:
    """UserError: the best epoch cannot be chosen by the number `name` on `data`; `masks`: the model gives masks."""
    choices: tuple[str, ...] = CROWDHUMAN_NAMES if data.format == "crowdhuman" else METRIC_NAMES
    if masks and data.masks is not None and data.format != "crowdhuman":
        choices += tuple(f"{MASK}{one}" for one in METRIC_NAMES)
    choices = tuple(one for one in choices if one not in SMALLER_IS_BETTER)
    if name not in choices:
        raise UserError(f"val.metric '{name}' cannot choose the best epoch here; {nearest(name, choices)}")


def larger_is_better(metrics: Mapping[str, Any], name: str, key: str) -> float:
    """The number `name` that the recipe's `key` watches, turned so that larger is better. UserError: it is not measured."""
    numbers = overall(metrics)
    if name not in numbers:
        raise UserError(f"{key} '{name}' is not measured here; {nearest(name, numbers)}")
    return -numbers[name] if name in SMALLER_IS_BETTER else numbers[name]


def _restrict(ground_truth: dict[str, Any], images: Iterable[int]) -> dict[str, Any]:
    """The ground truth of these images alone: a loader may have given only some of them."""
    image_ids = set(images)
    if len(image_ids) == len(ground_truth["images"]):
        return ground_truth
    return {
        **ground_truth,
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "annotations": [a for a in ground_truth["annotations"] if a["image_id"] in image_ids],
    }
