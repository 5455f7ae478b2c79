"""Instance masks as a network gives them, in a raster of its own, and how they are put into an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from yoloxkd.types import ImageMeta

THRESHOLD = 0.5
"""Probability from which a pixel belongs to the object."""


class SoftMasks(Protocol):
    """Masks of n objects that are not in an image yet."""

    def __getitem__(self, rows: Any) -> SoftMasks: ...

    def in_image(self, boxes: np.ndarray, meta: ImageMeta) -> np.ndarray:
        """(n, H, W) bool of the stored image, where the objects' boxes (n, 4) are in its px."""
        ...


@dataclass(slots=True)
class BoxMasks:
    """Masks inside boxes (Mask R-CNN, He et al. 2017).

    Attributes:
        probability: (n, s, s), 0 to 1, of the cells that a box is divided into
    """

    probability: np.ndarray

    def __getitem__(self, rows: Any) -> BoxMasks:
        return BoxMasks(self.probability[rows])

    def in_image(self, boxes: np.ndarray, meta: ImageMeta) -> np.ndarray:
        return paste_masks(self.probability, boxes, meta.height, meta.width)


def paste_masks(probability: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks of boxes put into an image, read bilinearly at pixel centers; nothing lies outside a box's cells.

    Args:
        probability: (n, s, s), 0 to 1
        boxes: (n, 4) px
        height, width: px of the image
    Returns:
        (n, H, W) bool
    """
    out = np.zeros((len(boxes), height, width), dtype=bool)
    for mask, soft, (x1, y1, x2, y2) in zip(out, probability, boxes.astype(np.float64), strict=True):
        if not (x2 > x1 and y2 > y1 and np.isfinite((x1, y1, x2, y2)).all()):
            continue  # a box without area has no mask
        rows, columns = _window(y1, y2, height), _window(x1, x2, width)
        by_row = _hat(y1, y2, rows, soft.shape[0])
        by_column = _hat(x1, x2, columns, soft.shape[1])
        mask[rows, columns] = by_row @ soft @ by_column.T >= THRESHOLD
    return out


def _window(low: float, high: float, limit: int) -> slice:
    """Pixels of an axis that a box reaches."""
    first = int(np.clip(np.floor(low) - 1, 0, limit))
    return slice(first, max(first, int(np.clip(np.ceil(high) + 1, 0, limit))))


def _hat(low: float, high: float, pixels: slice, cells: int) -> np.ndarray:
    """(pixels, cells) bilinear weights of the cells between low and high px at the pixels' centers."""
    at = (np.arange(pixels.start, pixels.stop) + 0.5 - low) / (high - low) * cells - 0.5
    return np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, None)
