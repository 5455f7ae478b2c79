"""COCO detection metrics by hotcoco (fast, the default) or pycocotools (the reference), with equal results."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from yoloxkd.errors import UserError, nearest

Backend = Literal["hotcoco", "pycocotools"]
Kind = Literal["bbox", "segm"]
BACKENDS: tuple[Backend, ...] = ("hotcoco", "pycocotools")
METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

ERROR_KINDS = {
    "Cls": "classification",
    "Loc": "localization",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
"""Error type by hotcoco's key."""
ERROR_MEANING = {
    "classification": "on an object of another class",
    "localization": "class right, IoU 0.1 to 0.5",
    "both": "class wrong, IoU 0.1 to 0.5",
    "duplicate": "on an object that a better detection has found",
    "background": "IoU below 0.1 with every object",
    "missed": "object with neither a right detection nor a classification or localization error on it",
}
COUNTED_FROM = 0.25  # least score of a counted detection: what `yoloxkd predict` shows
_MATCH, _BACKGROUND = 0.5, 0.1  # IoU, TIDE section 2.2
_IN_NO_RANGE = 1e11  # px: above the largest area that COCO evaluates, 1e10

# Axes of the evaluators' arrays: precision (IoU thresholds, recalls, classes, areas, caps), recall without the recalls.
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_IOU50, _IOU75 = 0, 5
_TOP1, _TOP10, _TOP100 = range(3)


@dataclass(slots=True)
class COCODetections:
    """Detections of a whole data set, one row each, in px of the original images.

    image_id  (n,) int64, of the images given to `coco_metrics`
    boxes     (n, 4) float, xyxy
    scores    (n,) float
    labels    (n,) int64, index into the names given to `coco_metrics`
    masks     n masks of the original images' size, as COCO's compressed run lengths; None: boxes alone
    """

    image_id: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    masks: list[bytes] | None = None

    def __len__(self) -> int:
        return len(self.scores)


def coco_metrics(
    ground_truth: dict[str, Any],
    detections: COCODetections,
    *,
    names: list[str],
    backend: str = "hotcoco",
    kind: Kind = "bbox",
) -> dict[str, Any]:
    """The twelve COCO numbers, 0 to 1, and AP and AP50 of every class.

    ground_truth is a COCO dictionary whose category names include `names` (any ids). Keys of the result: AP AP50 AP75
    APs APm APl AR1 AR10 AR100 ARs ARm ARl, and per_class {name: {"AP", "AP50"}}. As in pycocotools, a number with no
    ground truth to measure it on (no large object, a class that does not occur) is -1. No detections at all is a result
    of 0. With `kind` "segm" masks are compared instead of boxes: of the ground truth its
    `segmentation`; where an object has none, the region of its box is ignored. The ids are the caller's own: the numbers depend on the order of images and categories alone. UserError: unknown
    backend or one that fails, an image id that is not in the ground truth, an id that occurs twice, a name that is not
    among its categories.
    """
    if backend not in BACKENDS:
        raise UserError(f"val.backend '{backend}' is not known: {nearest(backend, BACKENDS)}")
    images = _positions([image["id"] for image in ground_truth["images"]], "images")
    categories = _positions([c["id"] for c in ground_truth["categories"]], "categories")
    labels = _labels(ground_truth, names)
    rows = _result_rows(images, labels, detections)
    truth = _by_position(ground_truth, images, categories)
    _match_difficult(truth, ground_truth, images, categories)
    results: np.ndarray | list[dict[str, Any]] = rows
    if kind == "segm":
        _add_masks(truth, ground_truth, images, categories)
        results = _mask_rows(truth, rows, detections)
    run = _run_hotcoco if backend == "hotcoco" else _run_pycocotools
    with contextlib.redirect_stdout(io.StringIO()), _failing(backend):
        category_ids, precision, recall = run(truth, results, kind)
    return _summarize(precision, recall, labels, category_ids)


def error_types(
    ground_truth: dict[str, Any], detections: COCODetections, *, names: list[str], conf: float = COUNTED_FROM
) -> dict[str, dict[str, float | int]]:
    """What is wrong with detections, by the error types of TIDE (Bolya et al., ECCV 2020, section 2.2), at IoU 0.5.

    Args:
        ground_truth, detections, names: as for `coco_metrics`.
        conf: least score of a detection that is counted; the cost in AP50 is of all detections.

    Returns:
        {kind: {"AP50": what AP50 would gain without these errors, 0 to 1; "count": how many there are}}, the kinds of
        `ERROR_KINDS` in their order. At most 100 detections of an image and class take part, as in the COCO metrics.

    Raises:
        UserError: as `coco_metrics`.
    """
    images = _positions([image["id"] for image in ground_truth["images"]], "images")
    categories = _positions([c["id"] for c in ground_truth["categories"]], "categories")
    rows = _result_rows(images, _labels(ground_truth, names), detections)
    truth = _by_position(ground_truth, images, categories)
    with contextlib.redirect_stdout(io.StringIO()), _failing("hotcoco"):
        cost = _tide(truth, rows)["delta_ap"]
        counts = _tide(truth, rows[rows[:, 5] >= conf])["counts"]
    return {kind: {"AP50": float(cost[key]), "count": int(counts[key])} for key, kind in ERROR_KINDS.items()}


def _tide(truth: dict[str, Any], rows: np.ndarray) -> dict[str, dict[str, Any]]:
    from hotcoco import COCO, COCOeval

    data = COCO(truth)
    evaluator: Any = COCOeval(data, data.load_res(rows), "bbox")
    evaluator.evaluate()
    errors: dict[str, dict[str, Any]] = evaluator.tide_errors(pos_thr=_MATCH, bg_thr=_BACKGROUND)
    return errors


def _positions(ids: list[Any], what: str) -> dict[Any, int]:
    """Position, from 1, of each id. Only these go to a backend: an id may be of any size, where a backend keeps float64."""
    positions = {id_: place for place, id_ in enumerate(ids, start=1)}
    if len(positions) < len(ids):
        raise UserError(f"the ground truth gives the same id to several {what}; ids must be unique")
    return positions


def _labels(ground_truth: dict[str, Any], names: list[str]) -> dict[str, int]:
    """Position, from 1, of each class among the categories."""
    by_name = {c["name"]: place for place, c in enumerate(ground_truth["categories"], start=1)}
    unknown = [n for n in names if n not in by_name]
    if unknown:
        raise UserError(f"class '{unknown[0]}' is not a category of the ground truth: {nearest(unknown[0], by_name)}")
    return {name: by_name[name] for name in names}


def _result_rows(images: dict[Any, int], labels: dict[str, int], detections: COCODetections) -> np.ndarray:
    """(n, 7) float64: position of the image, x, y, width, height, score, position of the category."""
    image_ids, which = np.unique(np.asarray(detections.image_id), return_inverse=True)
    strange = [image for image in image_ids.tolist() if image not in images]
    if strange:
        raise UserError(
            f"detections name image id {strange[0]} ({len(strange)} such ids), which the ground truth does not have: "
            "evaluate against the split the detections were made on"
        )
    place = np.array([images[image] for image in image_ids.tolist()], dtype=np.float64)
    category = np.array(list(labels.values()), dtype=np.float64)
    boxes = np.asarray(detections.boxes, dtype=np.float64).reshape(-1, 4)
    return np.column_stack(
        [
            place[which.reshape(-1)],
            boxes[:, :2],
            boxes[:, 2:] - boxes[:, :2],
            np.asarray(detections.scores, dtype=np.float64),
            category[np.asarray(detections.labels, dtype=np.int64)],
        ]
    )


def _by_position(ground_truth: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]) -> dict[str, Any]:
    """The ground truth with positions as ids, and nothing in it that a backend does not need: no path, no class name.

    Annotations are numbered from 1: pycocotools takes an object with id 0 for one that nothing has matched.
    """
    annotations = []
    for number, a in enumerate(_known_annotations(ground_truth, images, categories), start=1):
        x, y, w, h = a["bbox"]
        annotations.append(
            {
                "id": number,
                "image_id": images[a["image_id"]],
                "category_id": categories[a["category_id"]],
                "bbox": [x, y, w, h],
                "area": a.get("area", w * h),
                "iscrowd": int(a.get("iscrowd", 0)),
            }
        )
    return {
        "images": [
            {"id": place, "file_name": str(place), "height": image.get("height", 0), "width": image.get("width", 0)}
            for place, image in enumerate(ground_truth["images"], start=1)
        ],
        "categories": [{"id": place, "name": str(place)} for place in categories.values()],
        "annotations": annotations,
    }


def _known_annotations(
    ground_truth: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]
) -> Iterator[dict[str, Any]]:
    """The annotations of images and categories that are there."""
    return (a for a in ground_truth["annotations"] if a["image_id"] in images and a["category_id"] in categories)


def _match_difficult(
    truth: dict[str, Any], ground_truth: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]
) -> None:
    """Let an object marked `difficult` excuse what matches it by IoU, once: its area lies in none of the evaluators' ranges.

    A crowd region would excuse whatever lies inside it.
    """
    for row, a in zip(truth["annotations"], _known_annotations(ground_truth, images, categories), strict=True):
        if a.get("difficult"):
            row |= {"iscrowd": 0, "area": _IN_NO_RANGE}


def _add_masks(
    truth: dict[str, Any], ground_truth: dict[str, Any], images: dict[Any, int], categories: dict[Any, int]
) -> None:
    """Give the annotations of `truth` the masks of those of `ground_truth`; what has none becomes a region to ignore."""
    for row, a in zip(truth["annotations"], _known_annotations(ground_truth, images, categories), strict=True):
        row["segmentation"] = a.get("segmentation")
        if not row["segmentation"]:
            x, y, w, h = row["bbox"]
            row |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": 1}


def _mask_rows(truth: dict[str, Any], rows: np.ndarray, detections: COCODetections) -> list[dict[str, Any]]:
    """Detections in COCO's result format, with masks instead of boxes."""
    if detections.masks is None:
        raise UserError("mask metrics need detections with masks, and these have boxes alone; measure kind 'bbox'")
    sizes = [[image["height"], image["width"]] for image in truth["images"]]
    return [
        {
            "image_id": int(image),
            "category_id": int(category),
            "segmentation": {"size": sizes[int(image) - 1], "counts": counts.decode()},
            "score": score,
        }
        for (image, score, category), counts in zip(rows[:, [0, 5, 6]].tolist(), detections.masks, strict=True)
    ]


@contextlib.contextmanager
def _failing(backend: str) -> Iterator[None]:
    """What a backend raises as one sentence. A panic of hotcoco's Rust is a BaseException that is no Exception."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        other = next(name for name in BACKENDS if name != backend)
        raise UserError(
            f"{backend} could not compute the metrics ({type(error).__name__}: {' '.join(str(error).split())}); "
            f"try --set val.backend={other}"
        ) from error


_Arrays = tuple[list[int], np.ndarray, np.ndarray]


def _run_hotcoco(truth: dict[str, Any], rows: np.ndarray | list[dict[str, Any]], kind: Kind) -> _Arrays:
    from hotcoco import COCO, COCOeval

    data = COCO(truth)
    evaluator: Any = COCOeval(data, data.load_res(rows if len(rows) else np.zeros((0, 7))), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    return list(evaluator.params.cat_ids), evaluator.eval["precision"], evaluator.eval["recall"]


def _run_pycocotools(truth: dict[str, Any], rows: np.ndarray | list[dict[str, Any]], kind: Kind) -> _Arrays:
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
    evaluator = COCOeval(data, results, kind)
    evaluator.evaluate()
    evaluator.accumulate()
    return list(evaluator.params.catIds), evaluator.eval["precision"], evaluator.eval["recall"]


def _mean(values: np.ndarray) -> float:
    """Mean over what could be measured; -1 where nothing could."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _summarize(
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
