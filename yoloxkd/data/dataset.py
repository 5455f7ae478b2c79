"""A split in memory as arrays, so that 100,000 images cost little and reach workers fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from yoloxkd.data.io.images import read_image
from yoloxkd.data.io.packed_strings import Strings, readable
from yoloxkd.data.mask_table import MaskTable
from yoloxkd.data.problems import Faults

_BOX_COLUMNS = (
    "boxes",
    "labels",
    "crowd",
    "areas",
    "annotation_ids",
    "difficult",
    "unclipped",
    "visible",
    "head_boxes",
    "masks",
)


class ImageCache(Protocol):
    """Decoded images by position and reduction, as `DetectionData.read_reduced` gives them; not to be written to."""

    def read(self, index: int, reduce: int) -> tuple[np.ndarray, int]: ...


@dataclass(slots=True)
class DetectionData:
    """Images and boxes of one split. N images, M boxes; the boxes of image i are rows offsets[i] to offsets[i + 1].

    names           class names; a label is an index into them
    split           train, val, test
    image_ids       (N,) int64, the file's own where they are whole numbers, else positions from 1
    paths           N file names
    sizes           (N, 2) int32, height and width of the image as stored (upright, when EXIF says it is turned)
    boxes           (M, 4) float64, xyxy px of the stored image, clipped to it
    labels          (M,) int64
    crowd           (M,) bool: to be ignored, neither an object nor background
    areas           (M,) float64, px^2: the annotated area (of the segment, for COCO), else that of the box
    annotation_ids  (M,) int64, unique: the file's own, or numbers from 1 where that cannot be (`renumbered`)
    offsets         (N + 1,) int64
    faults          what the reader dropped or clipped
    format          the format it was read from, a key of `data.FORMATS`
    category_ids    (K,) int64, the file's own number of each class; None: label + 1
    image_keys      N ids as the file has them, in JSON, where `image_ids` are not those (texts, numbers beyond 64 bits)
    category_keys   K, likewise for `category_ids`

    cache           where decoded images are kept; None: nowhere

    What only some data have, None elsewhere:
    difficult       (M,) bool, rows of `crowd` that are one object too hard to judge, not a region of many
    unclipped       (M, 4) float64 xyxy px, boxes as annotated, beyond the image's borders
    visible         (M, 4) float64 xyxy px, the part of an object that shows; NaN where it is not annotated
    head_boxes      (M, 4) float64 xyxy px, a person's head, likewise
    masks           of the boxes; None: nobody asked for them, or the format has none
    unseen          (U, 5) float64: position of the image, and xyxy px as annotated, of objects whose box shows nothing of
                    the image. They are not in `boxes`, but a metric may count them as missed
    """

    names: list[str]
    split: str
    image_ids: np.ndarray
    paths: Sequence[str]
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    annotation_ids: np.ndarray
    offsets: np.ndarray
    faults: Faults = field(default_factory=Faults)
    format: str = "coco"
    category_ids: np.ndarray | None = None
    image_keys: Strings | None = None
    category_keys: list[int | str] | None = None
    difficult: np.ndarray | None = None
    renumbered: bool = False
    unclipped: np.ndarray | None = None
    visible: np.ndarray | None = None
    head_boxes: np.ndarray | None = None
    masks: MaskTable | None = None
    unseen: np.ndarray | None = None
    cache: ImageCache | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Strings):
            self.paths = Strings(self.paths)

    def __len__(self) -> int:
        return len(self.image_ids)

    def annotations(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """boxes (n, 4), labels (n,), crowd (n,) of one image; views, not to be written to."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return self.boxes[rows], self.labels[rows], self.crowd[rows]

    def image_of_box(self) -> np.ndarray:
        """(M,) position of each box's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def head(self, n: int) -> DetectionData:
        """The first n images (all, when there are fewer) with their boxes; the faults stay those of the whole split."""
        n = min(n, len(self))
        m = int(self.offsets[n])
        columns = {name: getattr(self, name) for name in _BOX_COLUMNS}
        rows: dict[str, Any] = {name: None if column is None else column[:m] for name, column in columns.items()}
        return replace(
            self,
            image_ids=self.image_ids[:n],
            image_keys=None if self.image_keys is None else self.image_keys[:n],
            paths=self.paths[:n],
            sizes=self.sizes[:n],
            offsets=self.offsets[: n + 1],
            unseen=None if self.unseen is None else self.unseen[self.unseen[:, 0] < n],
            **rows,
        )

    def take(self, rows: np.ndarray) -> DetectionData:
        """The same images with the boxes `rows` (M,) bool alone."""
        columns = {name: getattr(self, name) for name in _BOX_COLUMNS}
        selection: dict[str, Any] = {name: None if column is None else column[rows] for name, column in columns.items()}
        counts = np.bincount(self.image_of_box()[rows], minlength=len(self))
        return replace(self, offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), **selection)

    def own_image_ids(self) -> list[int | str]:
        """The file's own id of each image, a number or a text; the position from 1 where the format has none."""
        if self.image_keys is None:
            numbers: list[int | str] = self.image_ids.tolist()
            return numbers
        return [json.loads(key) for key in self.image_keys]

    def categories(self) -> list[int | str]:
        """The file's own id of each class, a number or a text; label + 1 where the format has none."""
        return list(self._category_numbers()) if self.category_keys is None else list(self.category_keys)

    def _category_numbers(self) -> list[int]:
        return list(range(1, len(self.names) + 1)) if self.category_ids is None else self.category_ids.tolist()

    def read(self, index: int) -> np.ndarray:
        """The image as uint8 (h, w, 3) RGB of the size in `sizes`. UserError: missing, broken, or of another size."""
        return self.read_reduced(index, 1)[0]

    def read_reduced(self, index: int, reduce: int) -> tuple[np.ndarray, int]:
        """The image decoded at 1/reduce of its size where its format can, and the factor it was reduced by."""
        if self.cache is not None:
            return self.cache.read(index, reduce)
        height, width = self.sizes[index].tolist()
        return read_image(self.paths[index], (height, width), reduce)

    def ground_truth(self) -> dict[str, Any]:
        """The split in COCO's format, for the metric, with the numbers of `image_ids` and `category_ids`.

        What is to be ignored is `iscrowd`; of that, what is one object is `difficult`.
        """
        image_ids = self.image_ids[self.image_of_box()]
        ids = np.array(self._category_numbers(), np.int64)
        xywh = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)
        columns = (self.annotation_ids, image_ids, ids[self.labels], xywh, self.areas, self.crowd.astype(np.int64))
        keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        annotations = [dict(zip(keys, row, strict=True)) for row in rows]
        for i in [] if self.difficult is None else np.flatnonzero(self.difficult).tolist():
            annotations[i]["difficult"] = 1
        images = zip(self.image_ids.tolist(), self.paths, self.sizes.tolist(), strict=True)
        return {
            "info": {},
            "images": [
                {"id": i, "file_name": readable(path), "height": size[0], "width": size[1]} for i, path, size in images
            ],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in zip(ids.tolist(), self.names, strict=True)],
        }

    def summary(self) -> str:
        """One line: images, boxes, boxes per class, and the faults if there are any."""
        objects = np.bincount(self.labels[~self.crowd], minlength=len(self.names))
        empty = int((np.diff(self.offsets) == 0).sum())
        shown = [f"{self.names[k]} {objects[k]}" for k in np.argsort(-objects, kind="stable")[:10] if objects[k]]
        if (objects > 0).sum() > 10:
            shown.append("...")
        text = f"{self.split}: {len(self)} images ({empty} without a box), {objects.sum()} boxes"
        text += f" ({', '.join(shown)})" if shown else ""
        text += f", {int(self.crowd.sum())} to ignore" if self.crowd.any() else ""
        return text + (f"; {self.faults.describe()}" if len(self.faults) else "")
