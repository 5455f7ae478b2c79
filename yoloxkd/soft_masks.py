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

    def in_image(self, boxes: np.ndarray, meta: ImageMeta) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 4) px and masks (n, H, W) bool of the stored image, where the objects' boxes are `boxes` in its px."""
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

    def in_image(self, boxes: np.ndarray, meta: ImageMeta) -> tuple[np.ndarray, np.ndarray]:
        return boxes, paste_masks(self.probability, boxes, meta.height, meta.width)


@dataclass(slots=True)
class FrameMasks:
    """Masks on the whole network input, which have no other boxes than what they cover (SOLO, Wang et al. 2020).

    Attributes:
        probability: (n, h, w) float, 0 to 1
        size: (H, W) px of the input
    """

    probability: np.ndarray
    size: tuple[int, int]

    def __getitem__(self, rows: Any) -> FrameMasks:
        return FrameMasks(self.probability[rows], self.size)

    def in_image(self, boxes: np.ndarray, meta: ImageMeta) -> tuple[np.ndarray, np.ndarray]:
        height, width = max(1, round(meta.height * meta.scale)), max(1, round(meta.width * meta.scale))
        top, left = round(meta.top), round(meta.left)
        content = (slice(top, top + height), slice(left, left + width))
        masks = enlarged_masks(self.probability, self.size, content, (meta.height, meta.width))
        return extents(masks).astype(np.float32), masks

    def in_boxes(self, boxes: np.ndarray, cells: int) -> BoxMasks:
        """The same in the raster of boxes (n, 4) px of the input, read bilinearly at the centers of cells x cells."""
        height, width = self.size
        out = np.zeros((len(boxes), cells, cells), np.float32)
        for part, soft, (x1, y1, x2, y2) in zip(out, self.probability, boxes.astype(np.float64), strict=True):
            at = (np.arange(cells) + 0.5) / cells
            y, x = (y1 + at * (y2 - y1)) * soft.shape[0] / height, (x1 + at * (x2 - x1)) * soft.shape[1] / width
            rows, columns = (
                np.clip(1 - np.abs(np.clip(place - 0.5, 0, n - 1)[:, None] - np.arange(n)), 0, None)
                for place, n in ((y, soft.shape[0]), (x, soft.shape[1]))
            )
            part[:] = rows @ soft @ columns.T
        return BoxMasks(out)


def enlarged_masks(
    probability: np.ndarray, size: tuple[int, int], content: tuple[slice, slice], image: tuple[int, int]
) -> np.ndarray:
    """Masks of an input's raster in the stored image: enlarged to the input, cut to its content, resized to the image.

    Args:
        probability: (n, h, w)
        size: (H, W) px of the input
        content: its rows and columns that are image
        image: (H, W) px of the stored image
    Returns:
        (n, H, W) bool
    """
    import cv2

    out = np.zeros((len(probability), *image), dtype=bool)
    for mask, soft in zip(out, probability, strict=True):
        whole = cv2.resize(soft, size[::-1], interpolation=cv2.INTER_LINEAR)[content]
        mask[:] = cv2.resize(whole, image[::-1], interpolation=cv2.INTER_LINEAR) > THRESHOLD
    return out


def extents(masks: np.ndarray) -> np.ndarray:
    """The smallest boxes around masks (n, H, W) bool: (n, 4) px; zeros around nothing."""
    out = np.zeros((len(masks), 4))
    for box, mask in zip(out, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return out


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
    for mask, soft, box in zip(out, probability, boxes, strict=True):
        rows, columns, values = pasted(soft, box, height, width)
        mask[rows, columns] = values >= THRESHOLD
    return out


def pasted(soft: np.ndarray, box: np.ndarray, height: int, width: int) -> tuple[slice, slice, np.ndarray]:
    """Rows and columns of an image of height x width px that a box (4,) reaches, and the probabilities (s, s) of its cells there."""
    x1, y1, x2, y2 = box.astype(np.float64)
    if not (x2 > x1 and y2 > y1 and np.isfinite((x1, y1, x2, y2)).all()):
        return slice(0), slice(0), np.zeros((0, 0))  # a box without area has no mask
    rows, columns = _window(y1, y2, height), _window(x1, x2, width)
    by_row = _bilinear_weights(y1, y2, rows, soft.shape[0])
    by_column = _bilinear_weights(x1, x2, columns, soft.shape[1])
    return rows, columns, by_row @ soft @ by_column.T


def _window(low: float, high: float, limit: int) -> slice:
    """Pixels of an axis that a box reaches."""
    first = int(np.clip(np.floor(low) - 1, 0, limit))
    return slice(first, max(first, int(np.clip(np.ceil(high) + 1, 0, limit))))


def _bilinear_weights(low: float, high: float, pixels: slice, cells: int) -> np.ndarray:
    """(pixels, cells) bilinear weights of the cells between low and high px at the pixels' centers."""
    at = (np.arange(pixels.start, pixels.stop) + 0.5 - low) / (high - low) * cells - 0.5
    weights: np.ndarray = np.clip(1 - np.abs(at[:, None] - np.arange(cells)), 0, None)
    return weights
