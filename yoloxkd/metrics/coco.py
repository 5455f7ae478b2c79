"""The COCO detection metrics, by hotcoco (fast, the default) or pycocotools (the reference): the same numbers."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from yoloxkd.errors import UserError, nearest

Backend = Literal["hotcoco", "pycocotools"]
BACKENDS: tuple[Backend, ...] = ("hotcoco", "pycocotools")
METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

# Axes of the evaluators' arrays: precision (IoU thresholds, recalls, classes, areas, caps), recall without the recalls.
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_IOU50, _IOU75 = 0, 5
_TOP1, _TOP10, _TOP100 = range(3)


@dataclass(slots=True)
class COCODetections:
    """Detections of a whole data set, one row each, in px of the original images.

    image_id  (n,) int64
    boxes     (n, 4) float, xyxy
    scores    (n,) float
    labels    (n,) int64, index into the names given to `coco_metrics`
    """

    image_id: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.scores)


def coco_metrics(
    ground_truth: dict[str, Any],
    detections: COCODetections,
    *,
    names: list[str],
    backend: str = "hotcoco",
) -> dict[str, Any]:
    """The twelve COCO numbers, 0 to 1, and AP and AP50 of every class.

    ground_truth is a COCO dictionary whose category names include `names` (any ids). Keys of the result: AP AP50 AP75
    APs APm APl AR1 AR10 AR100 ARs ARm ARl, and per_class {name: {"AP", "AP50"}}. As in pycocotools, a number with no
    ground truth to measure it on (no large object, a class that does not occur) is -1. No detections at all is a result
    of 0. UserError: unknown backend, an image id that is not in the ground truth, a name that is not among its
    categories.
    """
    if backend not in BACKENDS:
        raise UserError(f"val.backend '{backend}' is not known: {nearest(backend, BACKENDS)}")
    rows = _result_rows(ground_truth, detections, names)
    annotations = [_complete(a, number) for number, a in enumerate(ground_truth["annotations"], start=1)]
    truth = {
        "images": ground_truth["images"],
        "categories": ground_truth["categories"],
        "annotations": annotations,
    }
    run = _run_hotcoco if backend == "hotcoco" else _run_pycocotools
    with contextlib.redirect_stdout(io.StringIO()):
        category_ids, precision, recall = run(truth, rows)
    return _summarise(precision, recall, _ids_of(ground_truth, names), category_ids)


def _ids_of(ground_truth: dict[str, Any], names: list[str]) -> dict[str, int]:
    by_name = {c["name"]: int(c["id"]) for c in ground_truth["categories"]}
    unknown = [n for n in names if n not in by_name]
    if unknown:
        raise UserError(f"class '{unknown[0]}' is not a category of the ground truth: {nearest(unknown[0], by_name)}")
    return {name: by_name[name] for name in names}


def _result_rows(ground_truth: dict[str, Any], detections: COCODetections, names: list[str]) -> np.ndarray:
    """(n, 7) float64: image id, x, y, width, height, score, category id."""
    ids = np.array(list(_ids_of(ground_truth, names).values()), dtype=np.int64)
    images = np.array([image["id"] for image in ground_truth["images"]], dtype=np.int64)
    strange = np.setdiff1d(detections.image_id, images)
    if len(strange):
        raise UserError(
            f"detections name image id {strange[0]} ({len(strange)} such ids), which the ground truth does not have: "
            "evaluate against the split the detections were made on"
        )
    boxes = np.asarray(detections.boxes, dtype=np.float64).reshape(-1, 4)
    return np.column_stack(
        [
            np.asarray(detections.image_id, dtype=np.float64),
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2],
            np.asarray(detections.scores, dtype=np.float64),
            ids[np.asarray(detections.labels, dtype=np.int64)].astype(np.float64),
        ]
    )


def _complete(annotation: dict[str, Any], number: int) -> dict[str, Any]:
    """An annotation with every field the evaluators read.

    Ids are given anew, from 1: pycocotools takes an object with id 0 for one that nothing has matched.
    """
    x, y, w, h = annotation["bbox"]
    return {
        "id": number,
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": [x, y, w, h],
        "area": annotation.get("area", w * h),
        "iscrowd": int(annotation.get("iscrowd", 0)),
    }


_Arrays = tuple[list[int], np.ndarray, np.ndarray]


def _run_hotcoco(truth: dict[str, Any], rows: np.ndarray) -> _Arrays:
    from hotcoco import COCO, COCOeval

    data = COCO(truth)
    evaluator: Any = COCOeval(data, data.load_res(rows), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return list(evaluator.params.cat_ids), evaluator.eval["precision"], evaluator.eval["recall"]


def _run_pycocotools(truth: dict[str, Any], rows: np.ndarray) -> _Arrays:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = COCO()
    data.dataset = truth
    data.createIndex()
    if len(rows):
        results = data.loadRes(rows)
    else:  # loadRes reads the first row to learn the kind of result, and fails without one
        results = COCO()
        results.dataset = {**truth, "annotations": []}
        results.createIndex()
    evaluator = COCOeval(data, results, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return list(evaluator.params.catIds), evaluator.eval["precision"], evaluator.eval["recall"]


def _mean(values: np.ndarray) -> float:
    """Mean over what could be measured; -1 where nothing could."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _summarise(
    precision: np.ndarray, recall: np.ndarray, ids: dict[str, int], category_ids: list[int]
) -> dict[str, Any]:
    at = {category: k for k, category in enumerate(category_ids)}
    result: dict[str, Any] = {
        "AP": _mean(precision[..., _ALL, _TOP100]),
        "AP50": _mean(precision[_IOU50, ..., _ALL, _TOP100]),
        "AP75": _mean(precision[_IOU75, ..., _ALL, _TOP100]),
        "APs": _mean(precision[..., _SMALL, _TOP100]),
        "APm": _mean(precision[..., _MEDIUM, _TOP100]),
        "APl": _mean(precision[..., _LARGE, _TOP100]),
        "AR1": _mean(recall[..., _ALL, _TOP1]),
        "AR10": _mean(recall[..., _ALL, _TOP10]),
        "AR100": _mean(recall[..., _ALL, _TOP100]),
        "ARs": _mean(recall[..., _SMALL, _TOP100]),
        "ARm": _mean(recall[..., _MEDIUM, _TOP100]),
        "ARl": _mean(recall[..., _LARGE, _TOP100]),
    }
    result["per_class"] = {
        name: {
            "AP": _mean(precision[:, :, at[category], _ALL, _TOP100]),
            "AP50": _mean(precision[_IOU50, :, at[category], _ALL, _TOP100]),
        }
        for name, category in ids.items()
    }
    return result
