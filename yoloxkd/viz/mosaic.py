"""A sheet of pictures, ground truth beside prediction."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from yoloxkd.types import Detections
from yoloxkd.viz.draw import draw_boxes, draw_detections

_PAPER = 245
_GAP = 8


def truth_beside_prediction(
    images: Sequence[np.ndarray],
    truths: Sequence[Detections],
    predictions: Sequence[Detections],
    *,
    cell: int = 320,
    pairs_per_row: int = 2,
) -> np.ndarray:
    """Pictures in pairs, the left with its ground truth, the right with the prediction, as one RGB sheet.

    images n x (H, W, 3) uint8 RGB of any size; boxes in px of their image. Each picture is fitted into a square of `cell` px
    before it is drawn on, so captions stay readable. Returns (rows, columns, 3) uint8; no images give one empty cell.
    """
    blank = np.full((cell + 2 * _GAP, 2 * cell + 4 * _GAP, 3), _PAPER, dtype=np.uint8)
    pairs = []
    for image, truth, prediction in zip(images, truths, predictions, strict=True):
        small, scale = _fit(image, cell)
        left = draw_boxes(small, truth.boxes * scale, truth.labels, [_name(truth, k) for k in truth.labels])
        scaled = Detections(prediction.boxes * scale, prediction.scores, prediction.labels, prediction.names)
        pair = blank.copy()
        _paste(pair, left, _GAP, cell)
        _paste(pair, draw_detections(small, scaled), cell + 2 * _GAP, cell)
        pairs.append(pair)
    pairs = pairs or [blank]
    columns = min(pairs_per_row, len(pairs))
    pairs += [blank] * (-len(pairs) % columns)
    rows = [np.concatenate(pairs[i : i + columns], axis=1) for i in range(0, len(pairs), columns)]
    return np.concatenate(rows, axis=0)


def _fit(image: np.ndarray, cell: int) -> tuple[np.ndarray, float]:
    scale = cell / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), scale


def _paste(pair: np.ndarray, picture: np.ndarray, left: int, cell: int) -> None:
    """Centred in its square."""
    h, w = picture.shape[:2]
    y, x = _GAP + (cell - h) // 2, left + (cell - w) // 2
    pair[y : y + h, x : x + w] = picture


def _name(truth: Detections, label: int) -> str:
    return truth.names[int(label)] if truth.names else str(int(label))
