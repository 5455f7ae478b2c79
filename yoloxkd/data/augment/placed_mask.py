"""An instance mask on its way to the network input: its source and the map that brings it there, painted at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from yoloxkd.data.dataset import DetectionData
from yoloxkd.instance_masks import decode_rle, paint_polygons, rle_extent, unpack_counts


@dataclass(frozen=True, slots=True)
class PlacedMask:
    """A mask in px of its stored image, and where it goes.

    polygons  of (p, 2) x, y px
    counts    compressed run lengths, where there are no polygons; empty: there is no mask
    size      height and width px of the stored image
    matrix    (2, 3), px of the stored image -> px of the input, where pixel i covers i to i + 1
    cut       xyxy px of the stored image: the part of it that is shown
    """

    polygons: Sequence[np.ndarray]
    counts: bytes
    size: tuple[int, int]
    matrix: np.ndarray
    cut: tuple[float, float, float, float]

    def mirrored(self, width: float) -> PlacedMask:
        """Left and right exchanged in an input, or a part of it from its left border, of `width` px."""
        matrix = self.matrix * [[-1.0], [1.0]]
        matrix[0, 2] += width
        return replace(self, matrix=matrix)

    def paint(self, out: np.ndarray) -> None:
        """Set the mask's pixels of `out` (H, W) bool, which are all False."""
        if self.polygons:
            paint_polygons([self._moved(part) for part in self.polygons], out)
            low = np.min([part.min(0) for part in self.polygons], axis=0)
            high = np.max([part.max(0) for part in self.polygons], axis=0)
            inside = bool((low >= self.cut[:2]).all() and (high <= self.cut[2:]).all())
        elif self.counts:
            self._warp(out)
            inside = self.cut == (0.0, 0.0, float(self.size[1]), float(self.size[0]))
        else:
            return
        if not inside:
            x1, y1, x2, y2 = self.cut
            visible = np.zeros_like(out)
            paint_polygons([self._moved(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]))], visible)
            out &= visible

    def _moved(self, points: np.ndarray) -> np.ndarray:
        moved: np.ndarray = points @ self.matrix[:, :2].T + self.matrix[:, 2]
        return moved

    def _warp(self, out: np.ndarray) -> None:
        """Set the pixels of `out` (H, W) bool that the bitmap of the run lengths covers by half; only its own part is warped."""
        runs = unpack_counts(self.counts)
        x1, y1, x2, y2 = rle_extent(runs, self.size[0])
        reach = self._moved(np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64))
        limit = (out.shape[1], out.shape[0])
        left, top = np.clip(np.floor(reach.min(0)), 0, limit).astype(int).tolist()
        right, bottom = np.clip(np.ceil(reach.max(0)), 0, limit).astype(int).tolist()
        if right <= left or bottom <= top:
            return
        part = decode_rle(runs, *self.size)[y1:y2, x1:x2].astype(np.uint8) * 255
        matrix = self.matrix.copy()
        # cv2 counts from the middle of the first pixel
        matrix[:, 2] += matrix[:, :2] @ (x1 + 0.5, y1 + 0.5) - 0.5 - (left, top)
        warped = cv2.warpAffine(part, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
        out[top:bottom, left:right] |= np.asarray(warped) >= 128


def placed_masks(
    data: DetectionData, index: int, matrix: np.ndarray, cut: tuple[float, float, float, float]
) -> list[PlacedMask]:
    """The masks of an image of `data`, which has some, in the order of its boxes."""
    assert data.masks is not None
    height, width = data.sizes[index].tolist()
    rows = range(int(data.offsets[index]), int(data.offsets[index + 1]))
    return [PlacedMask(data.masks.polygons(row), data.masks.counts(row), (height, width), matrix, cut) for row in rows]
