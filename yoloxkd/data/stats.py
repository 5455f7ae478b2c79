"""Statistics of a split: boxes by class and size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from yoloxkd.data.dataset import DetectionData

SIZES = ("small", "medium", "large")
_LIMITS = (32**2, 96**2)  # px², COCO's: below the first small, below the second medium


@dataclass(slots=True)
class SplitStats:
    """Counts of a split.

    by_class     (K, 3) boxes that are small, medium, large (COCO's limits on the annotated area); none to be ignored
    with_class   (K,) images that hold a class
    per_image    (N,) boxes of each image
    masks        boxes that have a mask
    sides        (M,) square root of each box's area over its image's area, 0 to 1
    """

    split: str
    names: list[str]
    images: int
    empty: int
    ignored: int
    by_class: np.ndarray
    with_class: np.ndarray
    per_image: np.ndarray
    sizes: np.ndarray
    sides: np.ndarray
    masks: int = 0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        heights, widths = self.sizes[:, 0], self.sizes[:, 1]
        return {
            "images": self.images,
            "without_boxes": self.empty,
            "boxes": int(self.by_class.sum()),
            "ignored": self.ignored,
            "masks": self.masks,
            "boxes_per_image": _spread(self.per_image),
            "width": _spread(widths),
            "height": _spread(heights),
            "classes": {
                name: {"boxes": int(row.sum()), "images": int(images)}
                | {size: int(n) for size, n in zip(SIZES, row, strict=True)}
                for name, row, images in zip(self.names, self.by_class, self.with_class, strict=True)
            },
        }


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {"least": 0.0, "median": 0.0, "most": 0.0}
    return {"least": float(values.min()), "median": float(np.median(values)), "most": float(values.max())}


def split_stats(data: DetectionData) -> SplitStats:
    """Count a split; boxes to be ignored are counted apart and nowhere else."""
    real = ~data.crowd
    labels, image = data.labels[real], data.image_of_box()[real]
    size = np.searchsorted(_LIMITS, data.areas[real], side="right")
    by_class = np.zeros((len(data.names), len(SIZES)), np.int64)
    np.add.at(by_class, (labels, size), 1)
    pairs = np.unique(np.stack([image, labels], 1), axis=0)
    boxes = data.boxes[real]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) / data.sizes[image].astype(np.float64).prod(1)
    per_image = np.bincount(image, minlength=len(data))
    return SplitStats(
        split=data.split,
        names=list(data.names),
        images=len(data),
        empty=int((per_image == 0).sum()),
        ignored=int(data.crowd.sum()),
        by_class=by_class,
        with_class=np.bincount(pairs[:, 1], minlength=len(data.names)),
        per_image=per_image,
        sizes=data.sizes,
        sides=np.sqrt(area),
        masks=0 if data.masks is None else int(data.masks.there().sum()),
    )
