"""Mosaic and mixup as YOLOX trains with (Ge et al. 2021, section 2.2), without ever building the large canvas.

Four pictures meet at a random point of a canvas twice the input's size; a random affine map brings the canvas to the
input. Here each picture goes to the input in one warp, by the product of its placement and the map; a picture that the
input does not show is not even decoded, and a JPEG that is shown small is decoded small.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from yoloxkd.config.augment import Augment
from yoloxkd.data.records import DetectionData
from yoloxkd.data.transforms import (
    Color,
    Sample,
    Size,
    affine_of_mosaic,
    blank,
    clip_boxes,
    fit,
    move_boxes,
    worth_training,
)
from yoloxkd.types import ImageMeta

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""boxes (n, 4), labels (n,), crowd (n,)."""


def mosaic(
    data: DetectionData, indices: list[int], size: Size, augment: Augment, pad_value: Color, rng: np.random.Generator
) -> Sample:
    """A mosaic of the four pictures `indices`, turned, scaled, sheared and moved.

    Boxes are cut where their picture or the input ends; those of which little is left are dropped. `content` is the
    whole input. UserError: a picture cannot be read.
    """
    height, width = size
    canvas = blank(size, pad_value)
    matrix = affine_of_mosaic(augment, size, rng)
    centre_x, centre_y = rng.uniform(0.5, 1.5, 2) * (width, height)
    found = []
    for place, index in enumerate(indices):
        h, w = data.sizes[index].tolist()
        scale, new_h, new_w = fit(h, w, size)
        left = centre_x - (new_w if place % 2 == 0 else 0)
        top = centre_y - (new_h if place < 2 else 0)
        cut = (
            max(0.0, -left / scale),
            max(0.0, -top / scale),
            min(float(w), (2 * width - left) / scale),
            min(float(h), (2 * height - top) / scale),
        )
        found.append(paste(data, index, matrix @ _placement(scale, left, top), canvas, cut))
    boxes, labels, crowd = (np.concatenate(parts) for parts in zip(*found, strict=True))
    height, width = data.sizes[indices[0]].tolist()
    meta = ImageMeta(int(data.image_ids[indices[0]]), data.paths[indices[0]], height, width, math.nan)
    content = np.array([0, 0, size[1], size[0]], np.float32)
    return Sample(canvas, boxes, labels, crowd, content, meta)


def mixup(
    sample: Sample, data: DetectionData, index: int, augment: Augment, pad_value: Color, rng: np.random.Generator
) -> Sample:
    """Blend picture `index`, scaled, perhaps mirrored, somewhere, half and half into a sample; the boxes are both's."""
    height, width = sample.image.shape[:2]
    h, w = data.sizes[index].tolist()
    scale = fit(h, w, (height, width))[0]
    factor = rng.uniform(*augment.mixup_scale)
    room = np.array([width, height]) * (1 - factor)
    left, top = rng.uniform(np.minimum(room, 0), np.maximum(room, 0))
    matrix = _placement(scale * factor, float(left), float(top))
    if rng.random() < 0.5:
        matrix = matrix @ np.array([[-1.0, 0, w], [0, 1, 0], [0, 0, 1]])
    other = blank((height, width), pad_value)
    added = paste(data, index, matrix, other, (0.0, 0.0, float(w), float(h)))
    image = np.asarray(cv2.addWeighted(sample.image, 0.5, other, 0.5, 0))
    ours = (sample.boxes, sample.labels, sample.crowd)
    boxes, labels, crowd = (np.concatenate(pair) for pair in zip(ours, added, strict=True))
    return Sample(image, boxes, labels, crowd, sample.content, sample.meta)


def paste(
    data: DetectionData,
    index: int,
    matrix: np.ndarray,
    canvas: np.ndarray,
    cut: tuple[float, float, float, float],
) -> Boxes:
    """Draw the part `cut` (xyxy px) of picture `index` onto `canvas` (H, W, 3) through `matrix`; give its boxes there.

    matrix (3, 3) maps px of the stored picture to px of the canvas, in coordinates where pixel i covers i to i + 1.
    """
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = move_boxes(np.array([cut]), matrix)[0]
    left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
    right, bottom = min(width, math.ceil(x2)), min(height, math.ceil(y2))
    if right <= left or bottom <= top or cut[2] - cut[0] < 1 or cut[3] - cut[1] < 1:
        return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool)
    magnified = _magnification(matrix)
    picture, reduced = data.read_reduced(index, _reduction(math.sqrt(magnified)))
    column, row = int(cut[0] / reduced), int(cut[1] / reduced)
    part = picture[row : math.ceil(cut[3] / reduced), column : math.ceil(cut[2] / reduced)]
    warp = _placement(1.0, -left, -top) @ matrix @ _placement(reduced, column * reduced, row * reduced)
    warp[:2, 2] += warp[:2, :2] @ (0.5, 0.5) - 0.5  # cv2 counts from the middle of the first pixel
    cv2.warpAffine(
        part,
        warp[:2],
        (right - left, bottom - top),
        dst=canvas[top:bottom, left:right],
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_TRANSPARENT,
    )
    boxes, labels, crowd = data.annotations(index)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) * magnified
    shown = clip_boxes(boxes, cut)
    # A box outside the cut has no size, and a turned map would give it one.
    inside = (shown[:, 2:] > shown[:, :2]).all(1)
    moved = clip_boxes(move_boxes(shown, matrix), (0, 0, width, height))
    keep = inside & worth_training(moved, areas)
    return moved[keep].astype(np.float32), labels[keep], crowd[keep]


def _placement(scale: float, left: float, top: float) -> np.ndarray:
    return np.array([[scale, 0.0, left], [0.0, scale, top], [0.0, 0.0, 1.0]])


def _magnification(matrix: np.ndarray) -> float:
    """Area of the canvas that a unit area of the picture takes."""
    (a, b), (c, d) = matrix[:2, :2].tolist()
    return abs(float(a * d - b * c))


def _reduction(scale: float) -> int:
    """The largest fraction a decoder can give that still has a pixel for each pixel shown."""
    return next((factor for factor in (8, 4, 2) if scale * factor <= 1.0), 1)
