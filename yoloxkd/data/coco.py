"""Reads COCO instance annotations (cocodataset.org, "Data format", object detection) into arrays."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.data.images import check_images
from yoloxkd.data.records import DetectionData, Faults
from yoloxkd.errors import UserError

# A box may stick out of its image by this much without being called a fault: annotations are rounded.
_ROUNDING_PX = 0.5


def read_coco(images: Path, annotations: Path, names: list[str], split: str) -> DetectionData:
    """One split from a COCO JSON file and its folder of images.

    Categories are matched to `names` by name, so ids may be sparse and in any order; images keep the file's order.
    Boxes that cannot be trained on are dropped, boxes that stick out of their image are clipped; `faults` counts both.
    UserError: the file is missing, not JSON, or lacks a key; two images share an id; none of `names` is among the
    file's categories; an image file is missing, empty or cut short.
    """
    content = _read_json(annotations)
    label_of_category = _labels(content["categories"], names, annotations)
    ids, paths, sizes = _images(content["images"], images, annotations)
    check_images(paths, str(annotations))
    faults = Faults()
    table = _Table(content["annotations"], annotations)
    image_of_box = _positions(table.image_id, ids)
    table.drop(image_of_box < 0, "of an unknown image", faults)
    label_of_box = np.asarray([label_of_category.get(c, -2) for c in table.category_id.tolist()], np.int64)
    table.drop(label_of_box == -2, "of an unknown category", faults)
    table.drop(label_of_box == -1, "of a category that is not in names", faults)
    boxes = _check_boxes(table, sizes[image_of_box], faults)
    keep = np.flatnonzero(table.keep)
    keep = keep[np.argsort(image_of_box[keep], kind="stable")]
    box_areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return DetectionData(
        names=list(names),
        split=split,
        image_ids=ids,
        paths=paths,
        sizes=sizes,
        boxes=boxes[keep].astype(np.float32),
        labels=label_of_box[keep],
        crowd=table.crowd[keep],
        areas=np.where(np.isfinite(table.area), table.area, box_areas)[keep],
        annotation_ids=table.ids[keep],
        offsets=np.concatenate([[0], np.cumsum(np.bincount(image_of_box[keep], minlength=len(ids)))]).astype(np.int64),
        faults=faults,
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the annotation file {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"the annotation file {file} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"the annotation file {file} is not in COCO format: it lacks a list '{key}'")
    return dict(content)


def _labels(categories: list[dict[str, Any]], names: list[str], file: Path) -> dict[int, int]:
    """Category id -> label, or -1 for a category that is not in `names`."""
    label_of_name = {name: label for label, name in enumerate(names)}
    try:
        labels = {c["id"]: label_of_name.get(c["name"], -1) for c in categories}
    except (KeyError, TypeError) as error:
        raise UserError(f"the annotation file {file} has a category without a usable 'id' and 'name'") from error
    if all(label < 0 for label in labels.values()):
        found = ", ".join(str(c["name"]) for c in categories[:20]) or "none"
        wanted = ", ".join(names[:20])
        raise UserError(
            f"none of the names in the data YAML ({wanted}) is a category of {file} ({found}); make them agree"
        )
    return labels


def _images(rows: list[dict[str, Any]], folder: Path, file: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Ids (N,), paths, and sizes (N, 2) as height, width."""
    if not rows:
        raise UserError(f"the annotation file {file} lists no image")
    try:
        ids = np.array([row["id"] for row in rows])
        sizes = np.array([(row["height"], row["width"]) for row in rows])
        paths = [str(folder / row["file_name"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the annotation file {file} has an image without a usable {error}") from error
    if ids.dtype.kind != "i" or sizes.dtype.kind not in "if" or not (sizes > 0).all():
        raise UserError(
            f"the annotation file {file} has an image whose id, height or width is not a positive whole number"
        )
    value, count = Counter(ids.tolist()).most_common(1)[0]
    if count > 1:
        raise UserError(f"the annotation file {file} gives the image id {value} to {count} images; ids must be unique")
    return ids.astype(np.int64), paths, sizes.astype(np.int32)


def _positions(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For each wanted id its position in `ids`, -1 where there is none."""
    order = np.argsort(ids)
    place = np.clip(np.searchsorted(ids[order], wanted), 0, len(ids) - 1)
    return np.where(ids[order][place] == wanted, order[place], -1)


class _Table:
    """The annotations as columns, and which rows are still to be kept."""

    def __init__(self, rows: list[dict[str, Any]], file: Path) -> None:
        self.image_id = _whole_numbers([row.get("image_id") for row in rows], missing=np.iinfo(np.int64).min)
        self.category_id = _whole_numbers([row.get("category_id") for row in rows], missing=np.iinfo(np.int64).min)
        self.crowd = np.asarray([bool(row.get("iscrowd")) for row in rows], bool)
        self.area = _numbers([row.get("area") for row in rows], ())
        self.bbox = _numbers([row.get("bbox") for row in rows], (4,))
        ids = _whole_numbers([row.get("id") for row in rows], missing=0)
        # An evaluator takes id 0 for "no match", and needs ids to be unique.
        usable = len(ids) == 0 or (ids.min() > 0 and len(np.unique(ids)) == len(ids))
        self.ids = ids if usable else np.arange(1, len(ids) + 1, dtype=np.int64)
        self.said_ids = ids
        self.keep = np.ones(len(rows), bool)
        self.file = file.name

    def drop(self, rows: np.ndarray, kind: str, faults: Faults) -> None:
        """Stop keeping `rows` (a mask) and count those that were still kept."""
        self.count(rows, f"dropped, {kind}", faults)
        self.keep &= ~rows

    def count(self, rows: np.ndarray, kind: str, faults: Faults) -> None:
        found = np.flatnonzero(rows & self.keep)
        examples = [f"annotation {self.said_ids[i]} of {self.file}" for i in found[: faults.kept_examples]]
        faults.add(kind, examples, len(found))


def _check_boxes(table: _Table, sizes: np.ndarray, faults: Faults) -> np.ndarray:
    """xyxy (M, 4) clipped to the image sizes (M, 2); what is no box in the image stops being kept."""
    finite = np.isfinite(table.bbox).all(axis=1)
    table.drop(~finite, "whose box is not four finite numbers", faults)
    xywh = np.where(finite[:, None], table.bbox, 0.0)
    table.drop(np.any(xywh[:, 2:] <= 0, axis=1), "of zero or negative size", faults)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    limits = sizes[:, [1, 0, 1, 0]].astype(np.float64)
    clipped: np.ndarray = np.clip(corners, 0.0, limits)
    table.drop(np.any(clipped[:, 2:] <= clipped[:, :2], axis=1), "outside the image", faults)
    table.count(np.any(np.abs(clipped - corners) > _ROUNDING_PX, axis=1), "clipped to the image", faults)
    return clipped


def _whole_numbers(values: list[Any], missing: int) -> np.ndarray:
    """int64 (n,); `missing` where a value is no whole number."""
    try:
        array = np.array(values)
        if array.dtype.kind == "i" or not values:
            return array.astype(np.int64)
    except ValueError:
        pass
    return np.array([v if isinstance(v, int) and abs(v) < 2**63 else missing for v in values], np.int64)


def _numbers(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """float64 (n, *shape); NaN where a value is missing, no number, or of another shape."""
    try:
        array = np.array(values, np.float64)
        if array.shape == (len(values), *shape):
            return array
    except (TypeError, ValueError):
        pass
    out = np.full((len(values), *shape), np.nan)
    for row, value in enumerate(values):
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            continue
        if array.shape == shape:
            out[row] = array
    return out
