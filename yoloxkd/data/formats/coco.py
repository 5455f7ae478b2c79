"""COCO instance annotations (cocodataset.org, "Data format", object detection): read into arrays, and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.data.box_table import UNKNOWN, BoxTable, ImageColumns, check_corner_order, corners
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco_lists import ImageRows, match_categories
from yoloxkd.data.formats.format import Format, SplitSource
from yoloxkd.data.formats.values import NO_ID, IdCodes, flags, is_plain, number, numbers, typed
from yoloxkd.data.io.images import check_images
from yoloxkd.data.io.json_stream import Rows, json_lists
from yoloxkd.data.io.text_files import refuse_pointer
from yoloxkd.data.mask_table import MaskBuilder
from yoloxkd.data.problems import Faults
from yoloxkd.errors import UserError

_LISTS = ("images", "annotations", "categories")


def read_coco(
    images: Path,
    annotations: Path,
    names: list[str],
    split: str,
    faults: Faults | None = None,
    masks: bool = False,
) -> DetectionData:
    """One split from a COCO JSON file and its folder of images.

    Categories are matched to `names` by name, so ids may be sparse and in any order; images keep the file's order. Ids are
    whole numbers of any size and sign, or texts; "7" is 7.
    `iscrowd` and `ignore` mark what is to be ignored; `vbox` and `hbox` (xywh px), where there are any, are the visible
    part and the head. Boxes that cannot be trained on are dropped, boxes that stick out of their image are clipped;
    `faults` counts both. The file is read in blocks: captions, and segmentations without `masks`, take no memory.
    UserError: the file is missing, not JSON, or lacks a key; an image has no usable id, size or name, or the id of another;
    none of `names` is among the file's categories; nearly all boxes are fractions, or corners instead of sides; an image
    file is missing, broken or of another size.
    """
    faults = Faults() if faults is None else faults
    content = _Content(annotations, masks)
    categories = match_categories(content.categories, names, annotations, content.boxes.category_codes, faults)
    image_columns = content.image_columns(images, faults)
    if not faults.gather:
        check_images(image_columns.paths, str(annotations), image_columns.sizes)
    table = content.boxes.table(image_columns, content.images.codes, categories.label_of, str(annotations), faults)
    data = table.finish(names, split, image_columns, faults, "coco")
    data.category_ids, data.category_keys = categories.ids, categories.keys
    return data


class _Content:
    """The three lists of a COCO file as columns."""

    def __init__(self, file: Path, masks: bool) -> None:
        self.file = file
        self.categories: list[dict[str, Any]] = []
        self.boxes = _Columns(MaskBuilder() if masks else None)
        self.images = ImageRows(file, self.boxes.image_codes)
        keys = set()
        try:
            for rows in json_lists(file, frozenset(_LISTS)):
                if not rows.whole:
                    break
                self._take(rows)
                keys.add(rows.key)
        except OSError as error:
            raise UserError(f"cannot read the annotation file {file}: {error.strerror or error}") from error
        except ValueError as error:
            with file.open("rb") as stream:
                refuse_pointer(stream.read(64), f"the annotation file {file}")
            raise UserError(f"the annotation file {file} is not valid JSON: {error}") from error
        except RecursionError as error:
            raise UserError(
                f"the annotation file {file} is not in COCO format: its lists are nested too deeply"
            ) from error
        except TypeError as error:
            raise UserError(f"the annotation file {file} is not in COCO format: it is {error}") from error
        for key in _LISTS:
            if key not in keys:
                raise UserError(f"the annotation file {file} is not in COCO format: it lacks a list '{key}'")

    def _take(self, rows: Rows) -> None:
        before = {"images": self.images.count, "annotations": self.boxes.count, "categories": len(self.categories)}
        for place, row in enumerate(rows.values, before[rows.key]):
            if not isinstance(row, dict):
                raise UserError(
                    f"{rows.key}[{place}] of {self.file} is no object with keys, but {typed(row)}; correct it"
                )
        if rows.key == "categories":
            self.categories += rows.values
        elif rows.key == "annotations":
            self.boxes.add(rows)
        else:
            self.images.add(rows.values)

    def image_columns(self, folder: Path, faults: Faults) -> ImageColumns:
        return self.images.image_columns(folder, faults)


class _Columns:
    """The annotations as columns, gathered portion by portion."""

    def __init__(self, masks: MaskBuilder | None) -> None:
        self.masks = masks
        self.image_codes, self.category_codes = IdCodes(), IdCodes()
        self.count = 0
        self.parts: dict[str, list[np.ndarray]] = {
            name: []
            for name in ("image", "category", "id", "crowd", "hard", "unclear", "area", "bbox", "outlined", "line")
        }
        self.extra: dict[str, dict[int, np.ndarray]] = {"vbox": {}, "hbox": {}}

    def add(self, rows: Rows) -> None:
        values = rows.values
        crowd, odd_crowd = flags(row.get("iscrowd") for row in values)
        hard, odd_hard = flags(row.get("ignore") for row in values)
        ids = IdCodes().of([row.get("id") for row in values])
        bbox, outlined = _boxes(values)
        columns = {
            "image": self.image_codes.of([row.get("image_id") for row in values]),
            "category": self.category_codes.of([row.get("category_id") for row in values]),
            "id": np.where(is_plain(ids), ids, NO_ID),
            "crowd": crowd,
            "hard": hard & ~crowd,
            "unclear": odd_crowd | odd_hard,
            "area": _areas([row.get("area") for row in values]),
            "bbox": bbox,
            "outlined": outlined,
            "line": np.array(rows.lines, np.int32),
        }
        place = len(self.parts["image"])
        for key, portions in self.extra.items():
            if any(key in row for row in values):
                portions[place] = numbers([row.get(key) for row in values], (4,))
        for name, column in columns.items():
            self.parts[name].append(column)
        if self.masks is not None:
            self.masks.add([row.get("segmentation") for row in values])
        self.count += len(values)

    def table(
        self,
        images: ImageColumns,
        image_codes: np.ndarray,
        label_of_category: dict[int, int],
        file: str,
        faults: Faults,
    ) -> BoxTable:
        column = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        table = BoxTable(
            image=_positions(column["image"], image_codes),
            label=_labels_of(column["category"], label_of_category),
            boxes=corners(column["bbox"]),
            ignore=column["crowd"] | column["hard"],
            difficult=column["hard"],
            line=column["line"],
            files=[file],
            ids=column["id"],
            area=column["area"],
            written=column["bbox"],
            visible=self._extra("vbox"),
            head_boxes=self._extra("hbox"),
        )
        if self.masks is not None:
            table.take_masks(self.masks, faults)
        table.count(column["outlined"], "boxes that are missing, taken from the outline", faults)
        table.count(column["unclear"], "whose iscrowd or ignore is neither 0 nor 1, taken as 0", faults)
        if 2 * column["crowd"].sum() > len(table.keep):
            kind = "ignored for iscrowd 1, as most objects here (some tools mark every mask so; 0 is an object to train on)"
            table.count(column["crowd"], kind, faults)
        check_corner_order(table, column["bbox"], images.sizes, "[x, y, width, height]", faults)
        return table

    def _extra(self, key: str) -> np.ndarray | None:
        """(M, 4) xyxy px; None where no row has it."""
        portions = self.extra[key]
        if not portions:
            return None
        missing = [np.full((len(part), 4), np.nan) for part in self.parts["image"]]
        return corners(np.concatenate([portions.get(i, none) for i, none in enumerate(missing)]))


def _boxes(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """xywh px (n, 4), NaN where there is none; and which (n,) are those around an outline, for want of a bbox."""
    xywh = numbers([row.get("bbox") for row in rows], (4,))
    outlined = np.zeros(len(rows), bool)
    for i in np.flatnonzero(np.isnan(xywh).any(axis=1)).tolist():
        parts = rows[i].get("segmentation")
        if rows[i].get("bbox") in (None, []) and isinstance(parts, list) and parts:
            if not all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in parts):
                continue
            points = np.array([number(v) for part in parts for v in part]).reshape(-1, 2)
            if np.isfinite(points).all():
                xywh[i] = [*points.min(0), *np.ptp(points, axis=0)]
                outlined[i] = True
    return xywh, outlined


def _areas(values: Sequence[Any]) -> np.ndarray:
    """px² (n,), NaN where none is said, -1 where what is said is no number."""
    areas = numbers(values)
    present = np.array([value is not None for value in values], bool)
    return np.where(np.isnan(areas) & present, -1.0, areas)


def _labels_of(categories: np.ndarray, label_of_category: dict[int, int]) -> np.ndarray:
    values, inverse = np.unique(categories, return_inverse=True)
    labels = np.array([label_of_category.get(value, UNKNOWN) for value in values.tolist()], np.int64)
    return labels[inverse]


def _positions(queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The position in `ids` of each of `queries`, -1 where there is none."""
    order = np.argsort(ids)
    place = np.clip(np.searchsorted(ids[order], queries), 0, len(ids) - 1)
    return np.where(ids[order][place] == queries, order[place], -1)


def _read(source: SplitSource, names: list[str], split: str, faults: Faults) -> DetectionData:
    return read_coco(source.images[0], source.annotations[0], names, split, faults, source.masks)


def write_coco(data: DetectionData, files: Sequence[str], folder: Path) -> dict[str, str]:
    """annotations/<split>.json for images images/<split>/<file>; boxes as annotated, to 1e-9 px."""
    boxes = data.boxes if data.unclipped is None else data.unclipped
    content = data.ground_truth()
    images, categories = data.own_image_ids(), data.categories()
    for image, file, key in zip(content["images"], files, images, strict=True):
        image["file_name"], image["id"] = file, key
    for category, key in zip(content["categories"], categories, strict=True):
        category["id"] = key
    owners = zip(data.image_of_box().tolist(), data.labels.tolist(), strict=True)
    for row, (image, label) in zip(content["annotations"], owners, strict=True):
        row["image_id"], row["category_id"] = images[image], categories[label]
    for row, box in zip(content["annotations"], _rounded_xywh(boxes), strict=True):
        row["bbox"] = box
    if data.difficult is not None:
        for i in np.flatnonzero(data.difficult).tolist():
            row = content["annotations"][i]
            del row["difficult"]
            row |= {"iscrowd": 0, "ignore": 1}
    if data.masks is not None:
        for row, segmentation in zip(content["annotations"], data.masks.segmentations(), strict=True):
            row["segmentation"] = segmentation
    for key, column in (("vbox", data.visible), ("hbox", data.head_boxes)):
        if column is not None:
            xywh = _rounded_xywh(column)
            for i in np.flatnonzero(np.isfinite(column).all(1)).tolist():
                content["annotations"][i][key] = xywh[i]
    place = folder / "annotations" / f"{data.split}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content), encoding="utf-8")
    return {"images": f"images/{data.split}", "annotations": f"annotations/{data.split}.json"}


def _rounded_xywh(boxes: np.ndarray) -> list[list[float]]:
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    rows: list[list[float]] = xywh.round(9).tolist()
    return rows


COCO = Format(
    _read,
    write_coco,
    keeps=frozenset({"regions", "difficult", "areas", "unclipped", "visible", "heads", "masks", "names", "numbers"}),
)
