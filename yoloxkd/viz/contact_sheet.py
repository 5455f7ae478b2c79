"""Contact sheet of images: ground truth beside prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from yoloxkd.data.augment.transforms import fit_size, network_input
from yoloxkd.data.dataset import DetectionData
from yoloxkd.drawing import draw_boxes
from yoloxkd.types import Detections, ImageSize, Predictor
from yoloxkd.write_image import write_image

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
    """ImageColumns in pairs, the left with its ground truth, the right with the prediction, as one RGB sheet.

    images n x (H, W, 3) uint8 RGB of any size; boxes in px of their image. Each image is fitted into a square of
    `cell` px before it is drawn on, so captions stay readable. Returns (rows, columns, 3) uint8; no images give one
    empty cell.
    """
    blank = np.full((cell + 2 * _GAP, 2 * cell + 3 * _GAP, 3), _PAPER, dtype=np.uint8)
    pairs = []
    for image, truth, prediction in zip(images, truths, predictions, strict=True):
        small, scale = _fit(image, cell)
        left = draw_boxes(small, truth.boxes * scale, truth.labels, [_name(truth, k) for k in truth.labels])
        pair = blank.copy()
        _paste(pair, left, _GAP, cell)
        _paste(pair, prediction.moved(scale).plot(small), cell + 2 * _GAP, cell)
        pairs.append(pair)
    pairs = pairs or [blank]
    columns = min(pairs_per_row, len(pairs))
    pairs += [blank] * (-len(pairs) % columns)
    rows = [np.concatenate(pairs[i : i + columns], axis=1) for i in range(0, len(pairs), columns)]
    return np.concatenate(rows, axis=0)


def draw_comparison(
    predictor: Predictor,
    data: DetectionData,
    indices: Iterable[int],
    imgsz: ImageSize,
    output: Path,
    *,
    cell: int = 416,
) -> Path:
    """Write a sheet of some images of a data set: ground truth beside what `predictor` finds at `imgsz` px.

    Crowd regions are drawn too, marked as such. OSError when the file cannot be written.
    """
    import torch

    images, truths, predictions = [], [], []
    for index in indices:
        image = data.read(index)
        boxed, scale, left, top = network_input(image, imgsz, predictor.stride, predictor.pad_value)
        _, height, width = fit_size(image.shape[0], image.shape[1], imgsz)
        x, y = int(left), int(top)
        images.append(boxed[y : y + height, x : x + width])
        boxes, labels, crowd = data.annotations(index)
        names = [*data.names, *(f"{name} (crowd)" for name in data.names)]
        truths.append(Detections(boxes * scale, np.ones(len(boxes)), labels + crowd * len(data.names), names))
        prediction = predictor(torch.from_numpy(np.ascontiguousarray(boxed.transpose(2, 0, 1)))[None])[0]
        predictions.append(prediction.moved(1.0, -left, -top))
    sheet = truth_beside_prediction(images, truths, predictions, cell=cell)
    write_image(output, sheet)
    return output


def _fit(image: np.ndarray, cell: int) -> tuple[np.ndarray, float]:
    scale = cell / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR), scale


def _paste(pair: np.ndarray, image: np.ndarray, left: int, cell: int) -> None:
    """Centerd in its square."""
    h, w = image.shape[:2]
    y, x = _GAP + (cell - h) // 2, left + (cell - w) // 2
    pair[y : y + h, x : x + w] = image


def _name(truth: Detections, label: int) -> str:
    return truth.names[int(label)] if truth.names else str(int(label))
