"""COCO instance annotations (cocodataset.org, "Data format", object detection): read into arrays, and written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.data.box_table import UNKNOWN, UNWANTED, BoxTable, Pictures, numbers
from yoloxkd.data.faults import Faults
from yoloxkd.data.find_images import located
from yoloxkd.data.formats import Format, SplitSource
from yoloxkd.data.images import check_images
from yoloxkd.data.json_stream import Rows, json_lists
from yoloxkd.data.records import DetectionData
from yoloxkd.data.strings import Strings
from yoloxkd.data.texts import refuse_pointer
from yoloxkd.errors import UserError

_LISTS = ("images", "annotations", "categories")
_NO_ID = np.iinfo(np.int64).min


def read_coco(
    images: Path, annotations: Path, names: list[str], split: str, faults: Faults | None = None
) -> DetectionData:
    """One split from a COCO JSON file and its folder of images.

    Categories are matched to `names` by name, so ids may be sparse and in any order; images keep the file's order.
    `iscrowd` and `ignore` mark what is to be ignored; `vbox` and `hbox` (xywh px), where there are any, are the visible
    part and the head. Boxes that cannot be trained on are dropped, boxes that stick out of their image are clipped;
    `faults` counts both. The file is read in blocks: segmentations and captions take no memory.
    UserError: the file is missing, not JSON, or lacks a key; two images share an id; none of `names` is among the
    file's categories; an image file is missing, broken or of another size.
    """
    faults = Faults() if faults is None else faults
    content = _Content(annotations)
    label_of_category, category_ids = _labels(content.categories, names, annotations)
    pictures = content.pictures(images, faults)
    if not faults.gather:
        check_images(pictures.paths, str(annotations), pictures.sizes)
    table = content.boxes.table(pictures, label_of_category, str(annotations))
    data = table.finish(names, split, pictures, faults, "coco")
    data.category_ids = category_ids
    return data


class _Content:
    """The three lists of a COCO file as columns."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.categories: list[dict[str, Any]] = []
        self.boxes = _Columns()
        self._ids: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []
        self._names: list[str] = []
        seen = set()
        try:
            for rows in json_lists(file, frozenset(_LISTS)):
                if not rows.whole or not all(isinstance(row, dict) for row in rows.values):
                    break
                self._take(rows)
                seen.add(rows.key)
        except OSError as error:
            raise UserError(f"cannot read the annotation file {file}: {error.strerror or error}") from error
        except ValueError as error:
            with file.open("rb") as stream:
                refuse_pointer(stream.read(64), f"the annotation file {file}")
            raise UserError(f"the annotation file {file} is not valid JSON: {error}") from error
        except TypeError as error:
            raise UserError(f"the annotation file {file} is not in COCO format: it is {error}") from error
        for key in _LISTS:
            if key not in seen:
                raise UserError(f"the annotation file {file} is not in COCO format: it lacks a list '{key}'")

    def _take(self, rows: Rows) -> None:
        if rows.key == "categories":
            self.categories += rows.values
        elif rows.key == "annotations":
            self.boxes.add(rows)
        elif rows.values:
            try:
                self._ids.append(np.array([row["id"] for row in rows.values]))
                self._sizes.append(np.array([(row["height"], row["width"]) for row in rows.values]))
                self._names += [row["file_name"] for row in rows.values]
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"the annotation file {self.file} has an image without a usable {error}") from error

    def pictures(self, folder: Path, faults: Faults) -> Pictures:
        file = self.file
        if not self._ids:
            raise UserError(f"the annotation file {file} lists no image")
        ids, sizes = np.concatenate(self._ids), np.concatenate(self._sizes)
        if ids.dtype.kind != "i" or sizes.dtype.kind not in "if" or not (sizes > 0).all():
            raise UserError(
                f"the annotation file {file} has an image whose id, height or width is not a positive whole number"
            )
        value, count = Counter(ids.tolist()).most_common(1)[0]
        if count > 1:
            raise UserError(
                f"the annotation file {file} gives the image id {value} to {count} images; ids must be unique"
            )
        paths = Strings(located([str(folder / str(name)) for name in self._names], faults))
        return Pictures(ids.astype(np.int64), paths, sizes.astype(np.int32))


class _Columns:
    """The annotations as columns, gathered portion by portion."""

    def __init__(self) -> None:
        self.parts: dict[str, list[np.ndarray]] = {
            name: [] for name in ("image", "category", "id", "crowd", "difficult", "area", "bbox", "line")
        }
        self.extra: dict[str, dict[int, np.ndarray]] = {"vbox": {}, "hbox": {}}

    def add(self, rows: Rows) -> None:
        values = rows.values
        crowd = np.array([bool(row.get("iscrowd")) for row in values], bool)
        hard = np.array([bool(row.get("ignore")) for row in values], bool) & ~crowd
        columns = {
            "image": _whole_numbers([row.get("image_id") for row in values], missing=_NO_ID),
            "category": _whole_numbers([row.get("category_id") for row in values], missing=_NO_ID),
            "id": _whole_numbers([row.get("id") for row in values], missing=0),
            "crowd": crowd | hard,
            "difficult": hard,
            "area": numbers([row.get("area") for row in values]),
            "bbox": numbers([row.get("bbox") for row in values], (4,)),
            "line": np.array(rows.lines, np.int32),
        }
        place = len(self.parts["image"])
        for key, found in self.extra.items():
            if any(key in row for row in values):
                found[place] = numbers([row.get(key) for row in values], (4,))
        for name, column in columns.items():
            self.parts[name].append(column)

    def table(self, pictures: Pictures, label_of_category: dict[int, int], file: str) -> BoxTable:
        column = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        return BoxTable(
            image=_positions(column["image"], pictures.ids),
            label=_mapped(column["category"], label_of_category),
            boxes=_corners(column["bbox"]),
            ignore=column["crowd"],
            difficult=column["difficult"],
            line=column["line"],
            files=[file],
            ids=column["id"],
            area=column["area"],
            visible=self._extra("vbox"),
            head_boxes=self._extra("hbox"),
        )

    def _extra(self, key: str) -> np.ndarray | None:
        """(M, 4) xyxy px; None where no row has it."""
        found = self.extra[key]
        if not found:
            return None
        missing = [np.full((len(part), 4), np.nan) for part in self.parts["image"]]
        return _corners(np.concatenate([found.get(i, none) for i, none in enumerate(missing)]))


def _corners(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def _labels(categories: list[dict[str, Any]], names: list[str], file: Path) -> tuple[dict[int, int], np.ndarray]:
    """Category id -> label, or UNWANTED for a category that is not in `names`; and the id of each label.

    A name that the file does not have gets a free id.
    """
    label_of_name = {name: label for label, name in enumerate(names)}
    try:
        labels = {c["id"]: label_of_name.get(c["name"], UNWANTED) for c in categories}
    except (KeyError, TypeError) as error:
        raise UserError(f"the annotation file {file} has a category without a usable 'id' and 'name'") from error
    if all(label < 0 for label in labels.values()):
        found = ", ".join(str(c["name"]) for c in categories[:20]) or "none"
        wanted = ", ".join(names[:20])
        raise UserError(
            f"none of the names in the data YAML ({wanted}) is a category of {file} ({found}); make them agree"
        )
    numbered = {label: i for i, label in labels.items() if label >= 0 and isinstance(i, int)}
    free = max([0, *(i for i in labels if isinstance(i, int))]) + 1
    ids = []
    for label in range(len(names)):
        if label not in numbered:
            numbered[label], free = free, free + 1
        ids.append(numbered[label])
    return labels, np.array(ids, np.int64)


def _mapped(categories: np.ndarray, label_of_category: dict[int, int]) -> np.ndarray:
    values, inverse = np.unique(categories, return_inverse=True)
    labels = np.array([label_of_category.get(value, UNKNOWN) for value in values.tolist()], np.int64)
    return labels[inverse]


def _positions(wanted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """For each wanted id its position in `ids`, -1 where there is none."""
    order = np.argsort(ids)
    place = np.clip(np.searchsorted(ids[order], wanted), 0, len(ids) - 1)
    return np.where(ids[order][place] == wanted, order[place], -1)


def _whole_numbers(values: Sequence[Any], missing: int) -> np.ndarray:
    """int64 (n,); `missing` where a value is no whole number."""
    try:
        array = np.array(values)
        if array.dtype.kind == "i" or not values:
            return array.astype(np.int64)
    except ValueError:
        pass
    return np.array([v if isinstance(v, int) and abs(v) < 2**63 else missing for v in values], np.int64)


def _read(source: SplitSource, names: list[str], split: str, faults: Faults) -> DetectionData:
    return read_coco(source.images[0], source.annotations[0], names, split, faults)


def write_coco(data: DetectionData, files: Sequence[str], folder: Path) -> dict[str, str]:
    """annotations/<split>.json for pictures images/<split>/<file>; boxes as annotated, to 1e-9 px."""
    boxes = data.boxes if data.unclipped is None else data.unclipped
    content = data.ground_truth()
    for image, file in zip(content["images"], files, strict=True):
        image["file_name"] = file
    for row, box in zip(content["annotations"], _rounded_xywh(boxes), strict=True):
        row["bbox"] = box
    if data.difficult is not None:
        for i in np.flatnonzero(data.difficult).tolist():
            content["annotations"][i] |= {"iscrowd": 0, "ignore": 1}
    for key, column in (("vbox", data.visible), ("hbox", data.head_boxes)):
        if column is not None:
            xywh = _rounded_xywh(column)
            for i in np.flatnonzero(np.isfinite(column).all(1)).tolist():
                content["annotations"][i][key] = xywh[i]
    place = folder / "annotations" / f"{data.split}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(content), encoding="utf-8")
    return {"images": f"images/{data.split}", "annotations": f"annotations/{data.split}.json"}


def _rounded_xywh(corners: np.ndarray) -> list[list[float]]:
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    rows: list[list[float]] = xywh.round(9).tolist()
    return rows


COCO = Format(
    _read,
    write_coco,
    keeps=frozenset({"regions", "difficult", "areas", "unclipped", "visible", "heads", "names", "numbers"}),
)
