"""Cityscapes' fine polygons (Cordts et al. 2016), `gtFine/SPLIT/CITY/*_gtFine_polygons.json`: eight classes of things.

Polygons are given from back to front: what shows of an object is its polygon less all that follow. Its box is around
that. A group (`persongroup`) is a region to ignore; what is deleted, and number plates, cover nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yoloxkd.data.box_table import BoxTable, ImageColumns
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.format import Format, SplitSource
from yoloxkd.data.formats.values import number, size_px
from yoloxkd.data.io.images import check_images
from yoloxkd.data.io.packed_strings import Strings
from yoloxkd.data.io.text_files import decode_text
from yoloxkd.data.io.threads import in_threads
from yoloxkd.data.mask_table import FEW_POINTS, MaskBuilder
from yoloxkd.data.problems import Faults, Place, shown
from yoloxkd.errors import UserError
from yoloxkd.instance_masks import crop_rle

CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
_POLYGONS, _IMAGE, _GROUP = "_gtFine_polygons.json", "_leftImg8bit.png", "group"
_BEYOND_PX = 1e5  # a point farther out is no annotation


@dataclass(slots=True)
class _Object:
    """A thing that shows: name of its class, whether it is a group, xyxy px, px², run lengths where they are wanted."""

    name: str
    group: bool
    box: list[float]
    area: float
    counts: dict[str, Any] | None


@dataclass(slots=True)
class _File:
    """What is read of a file: height and width px, objects, and how many of its polygons were of no use, by kind."""

    size: tuple[int, int]
    objects: list[_Object]
    faults: dict[str, int]


def read_cityscapes(
    images: Path,
    annotations: Path,
    names: list[str],
    split: str,
    faults: Faults | None = None,
    masks: bool = False,
) -> DetectionData:
    """One split from the folder of its images and that of its polygons, each with a folder a city.

    UserError: there is no file of polygons, one is not as described, an image is missing, broken or of another size.
    """
    faults = Faults() if faults is None else faults
    files = sorted(str(file) for file in annotations.rglob(f"*{_POLYGONS}"))
    if not files:
        raise UserError(f"{annotations} has no file *{_POLYGONS}; name the folder gtFine/SPLIT as 'annotations'")
    contents = in_threads(partial(_read_file, names=names, masks=masks), files)
    paths = [str(images / Path(f).relative_to(annotations).parent / _image_name(f)) for f in files]
    image_columns = ImageColumns(
        np.arange(1, len(files) + 1), Strings(paths), np.array([one.size for one in contents], np.int32).reshape(-1, 2)
    )
    if not faults.gather:
        check_images(paths, str(annotations), image_columns.sizes)
    for file, one in zip(files, contents, strict=True):
        for kind, count in one.faults.items():
            faults.add(kind, [Place(file)], count)
    table = _table(files, contents, names)
    if masks:
        builder = MaskBuilder()
        builder.add([thing.counts for one in contents for thing in one.objects])
        table.take_masks(builder, faults)
    return table.finish(names, split, image_columns, faults, "cityscapes")


def _table(files: Sequence[str], contents: Sequence[_File], names: list[str]) -> BoxTable:
    things = [(i, thing) for i, one in enumerate(contents) for thing in one.objects]
    image = np.array([i for i, _ in things], np.int64)
    return BoxTable(
        image=image,
        label=np.array([names.index(thing.name) for _, thing in things], np.int64),
        boxes=np.array([thing.box for _, thing in things], np.float64).reshape(-1, 4),
        ignore=np.array([thing.group for _, thing in things], bool),
        difficult=np.zeros(len(things), bool),
        line=np.zeros(len(things), np.int64),
        files=files,
        file=image,
        area=np.array([thing.area for _, thing in things], np.float64),
    )


def _image_name(file: str) -> str:
    return Path(file).name.removesuffix(_POLYGONS) + _IMAGE


def _read_file(file: str, names: Sequence[str], masks: bool) -> _File:
    """UserError: it cannot be read, or is not as described."""
    try:
        content = json.loads(decode_text(Path(file).read_bytes(), f"the annotation file {file}"))
    except OSError as error:
        raise UserError(f"cannot read the annotation file {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the annotation file {file} is not valid JSON: {error}") from error
    rows = content.get("objects") if isinstance(content, dict) else None
    height, width = (size_px(content.get(key)) if isinstance(rows, list) else None for key in ("imgHeight", "imgWidth"))
    if not isinstance(rows, list) or height is None or width is None:
        raise UserError(
            f"the annotation file {file} is not Cityscapes': it lacks 'imgHeight', 'imgWidth' or a list 'objects'"
        )
    owner = np.zeros((height, width), np.int32)
    faults: dict[str, int] = {}
    placed: list[tuple[int, str, bool]] = []
    for position, row in enumerate(rows, start=1):
        label = row.get("label") if isinstance(row, dict) else None
        if not isinstance(label, str):
            raise UserError(f"objects[{position - 1}] of the annotation file {file} has no 'label'; correct it")
        if label.startswith("license plate") or row.get("deleted"):
            continue
        points = _points(row.get("polygon"))
        if points is None:
            kind = (
                FEW_POINTS if _is_short(row.get("polygon")) else f"polygons of '{shown(label)}' that are none, left out"
            )
            faults[kind] = faults.get(kind, 0) + 1
            continue
        cv2.fillPoly(owner, [points], position)
        name = label.removesuffix(_GROUP)
        if name in names:
            placed.append((position, name, name != label))
    objects = [_visible_object(owner, *one, _points(rows[one[0] - 1]["polygon"]), masks) for one in placed]
    if hidden := sum(one is None for one in objects):
        faults["objects that are wholly hidden, left out"] = hidden
    return _File((height, width), [one for one in objects if one is not None], faults)


def _points(polygon: Any) -> np.ndarray | None:
    """(p, 2) int32 px; None where it is no polygon of three points."""
    if not isinstance(polygon, list) or len(polygon) < 3:
        return None
    if not all(isinstance(point, list | tuple) and len(point) == 2 for point in polygon):
        return None
    points = np.array([[number(v) for v in point] for point in polygon], np.float64)
    return np.round(points).astype(np.int32) if bool((np.abs(points) < _BEYOND_PX).all()) else None


def _is_short(polygon: Any) -> bool:
    return isinstance(polygon, list) and len(polygon) < 3


def _visible_object(
    owner: np.ndarray, position: int, name: str, group: bool, points: np.ndarray | None, masks: bool
) -> _Object | None:
    """What shows of an object on the canvas `owner` (H, W) of object numbers; None: nothing."""
    assert points is not None
    height, width = owner.shape
    left, top = np.clip(points.min(0), 0, (width, height)).tolist()
    right, bottom = np.clip(points.max(0) + 1, 0, (width, height)).tolist()
    part = owner[top:bottom, left:right] == position
    columns, rows = np.flatnonzero(part.any(0)), np.flatnonzero(part.any(1))
    if not len(columns):
        return None
    box = [float(left + columns[0]), float(top + rows[0]), float(left + columns[-1] + 1), float(top + rows[-1] + 1)]
    counts = crop_rle(part, left, top, height, width) if masks else None
    return _Object(name, group, box, float(part.sum()), counts)


def _read(source: SplitSource, names: list[str], split: str, faults: Faults) -> DetectionData:
    return read_cityscapes(source.images[0], source.annotations[0], names, split, faults, source.masks)


CITYSCAPES = Format(_read, None, names=CLASSES)
