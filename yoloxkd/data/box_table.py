"""Annotated boxes as columns, and the checks that are the same for all formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.values import NO_ID
from yoloxkd.data.io.packed_strings import Strings
from yoloxkd.data.mask_table import MaskBuilder, MaskTable
from yoloxkd.data.problems import NEARLY_ALL, Faults, Place
from yoloxkd.errors import UserError

UNKNOWN, UNWANTED = -2, -1
"""Labels of rows whose class does not exist, or exists and is not among the data set's names."""
# A box may stick out of its image by this much without being called a fault: annotations are rounded.
_ROUNDING_PX = 0.5
# Sides below this are under a pixel; a box of one pixel may be written with few decimals.
_PIXEL = 0.95
_FEW = 3  # boxes, too few to tell their order by
_BEYOND_PX = 1.0
_MASK_PX, _MASK_PART = 2.0, 0.05  # px, and part of the box's sides, by which mask and box may differ: both are rounded
_MOST_AREA = 2.0
"""An area may be this many times its box's: outlines and boxes are rounded, and some tools count them apart."""


def corners(xywh: np.ndarray) -> np.ndarray:
    """(M, 4) boxes xywh -> xyxy; what is beyond floats becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


@dataclass(slots=True)
class ImageColumns:
    """The images of a split: ids (N,) int64, N paths, sizes (N, 2) height and width px; keys as `DetectionData.image_keys`."""

    ids: np.ndarray
    paths: Strings
    sizes: np.ndarray
    keys: Strings | None = None


@dataclass(slots=True)
class BoxTable:
    """M annotated boxes before they are checked.

    image       (M,) position of the image, -1: of no image there is
    label       (M,) class, UNKNOWN or UNWANTED
    boxes       (M, 4) float64 xyxy px, NaN where what is annotated is no box
    ignore      (M,) bool; difficult (M,) bool, those of them that are one object
    line        (M,) line of the annotation file, 0: it has none
    files       the annotation files, by name; file (M,) which of them, None: the only one
    ids         (M,) the file's own numbers of the boxes, NO_ID where one has none; None: there are none
    area        (M,) px², NaN: that of the box; None: of all boxes
    written     (M, 4) box as the file writes it, to tell fractions of the image from pixels; None: it writes fractions
    visible, head_boxes  (M, 4) xyxy px, NaN where not annotated; None: nowhere
    masks       of the boxes; None: nobody asked for them, or there are none
    keep        (M,) bool, rows that are still wanted
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    ignore: np.ndarray
    difficult: np.ndarray
    line: np.ndarray
    files: Sequence[str]
    file: np.ndarray | None = None
    ids: np.ndarray | None = None
    area: np.ndarray | None = None
    written: np.ndarray | None = None
    visible: np.ndarray | None = None
    head_boxes: np.ndarray | None = None
    masks: MaskTable | None = None
    keep: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.keep = np.ones(len(self.image), bool)

    def drop(self, rows: np.ndarray, kind: str, faults: Faults) -> None:
        """Stop keeping `rows` (a mask) and count those that were still kept."""
        self.count(rows, f"dropped, {kind}", faults)
        self.keep &= ~rows

    def count(self, rows: np.ndarray, kind: str, faults: Faults) -> None:
        indices = np.flatnonzero(rows & self.keep)
        faults.add(kind, [self.place(i) for i in indices[: faults.room(len(indices))].tolist()], len(indices))

    def refuse(self, rows: np.ndarray, kind: str, sentence: str, faults: Faults) -> None:
        """Rows that training cannot go on with: raises UserError(sentence), or counts them when gathering."""
        if not faults.gather:
            raise UserError(sentence)
        faults.breaking.add(kind)
        self.count(rows, kind, faults)

    def take_masks(self, masks: MaskBuilder, faults: Faults) -> None:
        """The masks that a reader gathered, a row a box; what was wrong with them is counted."""
        self.masks = masks.table()
        for kind, rows in masks.faults.items():
            wrong = np.zeros(len(self.keep), bool)
            wrong[rows] = True
            self.count(wrong, kind, faults)

    def place(self, row: int) -> Place:
        file = self.files[0 if self.file is None else int(self.file[row])]
        note = ""
        if self.ids is not None:
            note = f"annotations[{row}]" if self.ids[row] == NO_ID else f"annotation {self.ids[row]}"
        return Place(file, int(self.line[row]) or None, note)

    def finish(self, names: list[str], split: str, images: ImageColumns, faults: Faults, format: str) -> DetectionData:
        """The rows that can be trained on, in the images' order; the others are counted in `faults`."""
        self.drop(self.image < 0, "of an unknown image", faults)
        self.drop(self.label == UNKNOWN, "of an unknown category", faults)
        self.drop(self.label == UNWANTED, "of a category that is not in names", faults)
        whole, clipped, unseen = self._check_boxes(images, faults)
        self._check_units(whole, faults)
        areas = self._areas(whole, faults)
        masks = None if self.masks is None else self._checked_masks(self.masks, whole, images, faults)
        if faults.gather:
            self.count(self._repeated_rows(whole), "repeated: the same box of the same class again (kept)", faults)
        rows = np.flatnonzero(self.keep)
        rows = rows[np.argsort(self.image[rows], kind="stable")]
        boxes = clipped[rows]
        areas = np.where(np.isnan(areas[rows]), np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), areas[rows])
        beyond = np.abs(whole[rows] - boxes).max(initial=0) > 0
        counts = np.bincount(self.image[rows], minlength=len(images.ids))
        return DetectionData(
            names=list(names),
            split=split,
            image_ids=images.ids,
            image_keys=images.keys,
            paths=images.paths,
            sizes=images.sizes,
            boxes=boxes,
            labels=self.label[rows].astype(np.int64),
            crowd=self.ignore[rows],
            areas=areas,
            annotation_ids=(ids := self._usable_ids())[rows],
            renumbered=ids is not self.ids,
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            faults=faults,
            format=format,
            difficult=self.difficult[rows] if self.difficult.any() else None,
            unclipped=whole[rows] if beyond else None,
            visible=None if self.visible is None else self.visible[rows],
            head_boxes=None if self.head_boxes is None else self.head_boxes[rows],
            masks=None if masks is None else masks[rows],
            unseen=unseen if len(unseen) else None,
        )

    def _check_boxes(self, images: ImageColumns, faults: Faults) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes as annotated and clipped, (M, 4) each, and objects without a box in their image (U, 5)."""
        finite = np.isfinite(self.boxes).all(axis=1)
        self.drop(~finite, "whose box is not four finite numbers", faults)
        whole = np.where(finite[:, None], self.boxes, 0.0)
        before = self.keep.copy()
        self.drop(np.any(whole[:, 2:] <= whole[:, :2], axis=1), "of zero or negative size", faults)
        limits = images.sizes[self.image][:, [1, 0, 1, 0]].astype(np.float64)
        clipped: np.ndarray = np.clip(whole, 0.0, limits)
        self.drop(np.any(clipped[:, 2:] <= clipped[:, :2], axis=1), "outside the image", faults)
        self.count(np.any(np.abs(clipped - whole) > _ROUNDING_PX, axis=1), "clipped to the image", faults)
        unseen = before & ~self.keep & ~self.ignore
        return whole, clipped, np.column_stack([self.image[unseen], whole[unseen]])

    def _check_units(self, whole: np.ndarray, faults: Faults) -> None:
        """Count boxes that are no pixels, or under one; where nearly all objects are, training has nothing to see."""
        objects = self.keep & ~self.ignore
        total = max(int(objects.sum()), 1)
        fractions = np.zeros(len(objects), bool)
        if self.written is not None:
            with np.errstate(invalid="ignore"):
                fractions = self.keep & ((self.written >= 0) & (self.written <= 1)).all(axis=1)
        if fractions[objects].sum() >= NEARLY_ALL * total:
            sentence = (
                f"{fractions[objects].sum()} of {total} boxes of {self._first(fractions)} are fractions of the image (0 to 1), "
                "where the format has pixels; multiply them by the image's width and height"
            )
            self.refuse(fractions, "boxes that are fractions of the image (0 to 1) instead of pixels", sentence, faults)
        else:
            fractions[:] = False
        small = (whole[:, 2:] - whole[:, :2] < _PIXEL).any(axis=1) & self.keep & ~fractions
        kind = "boxes under a pixel"
        if small[objects].sum() >= NEARLY_ALL * total:
            sentence = (
                f"{small[objects].sum()} of {total} boxes of {self._first(small)} are under a pixel wide or high; they "
                "are not in pixels of the image, or nothing can be learned from them"
            )
            self.refuse(small, kind, sentence, faults)
        else:
            self.count(small, kind, faults)

    def _first(self, rows: np.ndarray) -> Place:
        return self.place(int(np.flatnonzero(rows)[0]))

    def _areas(self, whole: np.ndarray, faults: Faults) -> np.ndarray:
        """(M,) areas px² that the boxes can have, NaN: that of the box."""
        if self.area is None:
            return np.full(len(self.image), np.nan)
        with np.errstate(over="ignore", invalid="ignore"):
            box = np.prod(whole[:, 2:] - whole[:, :2], axis=1)
            tiny = (self.area < 1) & (self.area < 0.1 * box)  # a fraction of the image
            wrong = (self.area <= 0) | (self.area > _MOST_AREA * box + 4) | tiny
        self.count(wrong, "areas that the box cannot have, replaced by the box's", faults)
        return np.where(wrong, np.nan, self.area)

    def _checked_masks(
        self, masks: MaskTable, whole: np.ndarray, images: ImageColumns, faults: Faults
    ) -> MaskTable | None:
        """Count masks that do not fit their image (left out) or their box (kept), and objects without one; None: all are."""
        sized = masks.rle_sizes.any(axis=1)
        other = sized & (masks.rle_sizes != images.sizes[self.image]).any(axis=1)
        self.count(other, "masks whose run lengths are of another size than the image, left out", faults)
        masks = masks.without(other) if other.any() else masks
        there = masks.there()
        if not there.any():
            return None
        room = _MASK_PX + _MASK_PART * np.tile(whole[:, 2:] - whole[:, :2], 2)
        with np.errstate(invalid="ignore"):
            apart = there & ~(np.abs(masks.extents() - whole) <= room).all(axis=1)
        self.count(apart, "masks that do not agree with their box (kept)", faults)
        self.count(~there & ~self.ignore, "objects without a mask, of which the box alone is trained", faults)
        return masks

    def _repeated_rows(self, whole: np.ndarray) -> np.ndarray:
        """(M,) bool: kept rows equal to an earlier one."""
        rows = np.flatnonzero(self.keep)
        columns = np.column_stack([self.image, self.label, self.ignore, np.round(whole, 6)])[rows]
        _, first = np.unique(columns, axis=0, return_index=True)
        repeated = np.zeros(len(self.keep), bool)
        repeated[np.delete(rows, first)] = True
        return repeated

    def _usable_ids(self) -> np.ndarray:
        """(M,) the file's own ids, where every row has one and they are unique; else numbers from 1."""
        ids = self.ids
        if ids is None or (ids == NO_ID).any() or len(np.unique(ids)) < len(ids):
            return np.arange(1, len(self.image) + 1, dtype=np.int64)
        return ids


def check_corner_order(table: BoxTable, values: np.ndarray, sizes: np.ndarray, order: str, faults: Faults) -> None:
    """Refuse boxes that are (x1, y1, x2, y2), where the format has another `order`.

    They are, where each box makes sense as corners and more than half stick out of their image as the format has them.
    values  (M, 4) px, read as if they were corners; sizes (N, 2) height and width px of the images
    """
    if not len(sizes):
        return
    rows = (table.image >= 0) & np.isfinite(table.boxes).all(axis=1) & ~table.ignore
    box, limit = values[rows], sizes[table.image[rows]][:, ::-1] + _BEYOND_PX
    ordered = (box[:, 2:] > box[:, :2]).all(axis=1) & (box[:, 2:] <= limit).all(axis=1)
    beyond = (table.boxes[rows][:, 2:] > limit).any(axis=1) | (table.boxes[rows][:, :2] < -_BEYOND_PX).any(axis=1)
    if len(box) < _FEW or not ordered.all() or 2 * beyond.sum() <= len(box):
        return
    sentence = (
        f"{beyond.sum()} of {len(box)} boxes of {table.place(int(np.flatnonzero(rows)[0]))} stick out of their image as "
        f"{order}, and none as [x1, y1, x2, y2]; write them as {order}"
    )
    table.refuse(rows, f"boxes that look like [x1, y1, x2, y2], where the format has {order}", sentence, faults)
