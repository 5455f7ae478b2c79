"""A split of a data set in memory: arrays, not objects, so that 100,000 images cost little and reach workers fast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from yoloxkd.data.images import read_image


@dataclass(slots=True)
class Faults:
    """What was wrong with a data set and mended or left out: counts and first examples by kind.

    A kind is a phrase that follows a number: "dropped, of zero or negative size", "clipped to the image".
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    kept_examples: int = 5

    def add(self, kind: str, examples: Iterable[str], count: int | None = None) -> None:
        """Count `count` (default: the number of examples) faults of a kind; the first few examples are kept."""
        found = list(examples)
        number = len(found) if count is None else count
        if number:
            self.counts[kind] = self.counts.get(kind, 0) + number
            shown = self.examples.setdefault(kind, [])
            shown.extend(found[: self.kept_examples - len(shown)])

    def __len__(self) -> int:
        return sum(self.counts.values())

    def describe(self) -> str:
        """One line: every kind with its count and its first example; empty when there is no fault."""
        parts = [
            f"{count} {kind} (e.g. {self.examples[kind][0]})" if self.examples.get(kind) else f"{count} {kind}"
            for kind, count in self.counts.items()
        ]
        return "annotations: " + ", ".join(parts) if parts else ""


@dataclass(slots=True)
class DetectionData:
    """Images and boxes of one split. N images, M boxes; the boxes of image i are rows offsets[i] to offsets[i + 1].

    names           class names; a label is an index into them
    split           train, val, test
    image_ids       (N,) int64
    paths           N file names
    sizes           (N, 2) int32, height and width of the image as stored (upright, when EXIF says it is turned)
    boxes           (M, 4) float32, xyxy px of the stored image
    labels          (M,) int64
    crowd           (M,) bool: a region to ignore, not an object
    areas           (M,) float64, px^2: the annotated area (of the segment, for COCO), else that of the box
    annotation_ids  (M,) int64, unique, 1 or more
    offsets         (N + 1,) int64
    faults          what the reader dropped or clipped
    """

    names: list[str]
    split: str
    image_ids: np.ndarray
    paths: list[str]
    sizes: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    annotation_ids: np.ndarray
    offsets: np.ndarray
    faults: Faults = field(default_factory=Faults)

    def __len__(self) -> int:
        return len(self.image_ids)

    def annotations(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """boxes (n, 4), labels (n,), crowd (n,) of one image; views, not to be written to."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return self.boxes[rows], self.labels[rows], self.crowd[rows]

    def head(self, n: int) -> DetectionData:
        """The first n images (all, when there are fewer) with their boxes; the faults stay those of the whole split."""
        n = min(n, len(self))
        m = int(self.offsets[n])
        columns = (self.boxes, self.labels, self.crowd, self.areas, self.annotation_ids)
        boxes, labels, crowd, areas, ids = (column[:m] for column in columns)
        return replace(
            self,
            image_ids=self.image_ids[:n],
            paths=self.paths[:n],
            sizes=self.sizes[:n],
            boxes=boxes,
            labels=labels,
            crowd=crowd,
            areas=areas,
            annotation_ids=ids,
            offsets=self.offsets[: n + 1],
        )

    def read(self, index: int) -> np.ndarray:
        """The picture as uint8 (h, w, 3) RGB of the size in `sizes`. UserError: missing, broken, or of another size."""
        return self.read_reduced(index, 1)[0]

    def read_reduced(self, index: int, reduce: int) -> tuple[np.ndarray, int]:
        """The picture decoded at 1/reduce of its size where its format can, and the factor it was reduced by."""
        height, width = self.sizes[index].tolist()
        return read_image(self.paths[index], (height, width), reduce)

    def ground_truth(self) -> dict[str, Any]:
        """The split in COCO's format, for the metric; category ids are label + 1."""
        image_of_box = np.repeat(self.image_ids, np.diff(self.offsets))
        corners = self.boxes.astype(np.float64)
        xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        columns = (self.annotation_ids, image_of_box, self.labels + 1, xywh, self.areas, self.crowd.astype(np.int64))
        keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        images = zip(self.image_ids.tolist(), self.paths, self.sizes.tolist(), strict=True)
        return {
            "info": {},
            "images": [{"id": i, "file_name": path, "height": size[0], "width": size[1]} for i, path, size in images],
            "annotations": [dict(zip(keys, row, strict=True)) for row in rows],
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(self.names)],
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
        text += f", {int(self.crowd.sum())} crowd regions" if self.crowd.any() else ""
        return text + (f"; {self.faults.describe()}" if len(self.faults) else "")
