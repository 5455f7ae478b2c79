"""Mosaic and mixup as YOLOX trains with (Ge et al. 2021, section 2.2), without ever building the large canvas.

Four images meet at a random point of a canvas twice the input's size; a random affine map brings the canvas to the
input. Here each image goes to the input in one warp, by the product of its placement and the map; an image that the
input does not show is not even decoded, and a JPEG that is shown small is decoded small.

Canvases have a fourth channel that nobody reads: OpenCV warps four channels in less than half the time of three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain, compress

import cv2
import numpy as np

from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.placed_mask import PlacedMask, placed_masks
from yoloxkd.data.augment.transforms import (
    Color,
    Sample,
    Size,
    affine_of_mosaic,
    fit,
    worth_training,
)
from yoloxkd.data.dataset import DetectionData
from yoloxkd.types import ImageMeta

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray, list[PlacedMask] | None]
"""boxes (n, 4), labels (n,), crowd (n,), masks where the data has them."""
Rows = tuple[tuple[float, float, float], tuple[float, float, float]]
"""An affine map: x' = a x + b y + c and y' = d x + e y + f, px in coordinates where pixel i covers i to i + 1."""


@dataclass(frozen=True, slots=True)
class Tile:
    """An image on a canvas.

    index   of the image
    matrix  px of the stored image -> px of the canvas
    cut     xyxy px of the stored image: the part of it that is shown
    scale   that the image alone would be resized by to fit the input: no more pixels are decoded than that keeps
    """

    index: int
    matrix: Rows
    cut: tuple[float, float, float, float]
    scale: float

    @property
    def magnification(self) -> float:
        """Area of the canvas that a unit area of the image takes."""
        (a, b, _), (d, e, _) = self.matrix
        return abs(a * e - b * d)


def new_canvas(size: Size, pad_value: Color) -> np.ndarray:
    """(H, W, 4) uint8 filled with one color."""
    out = np.empty((*size, 4), np.uint8)
    out.view(np.uint32)[:] = np.array([*pad_value, 0], np.uint8).view(np.uint32)
    return out


def mosaic(
    data: DetectionData, indices: list[int], size: Size, augment: Augment, pad_value: Color, rng: np.random.Generator
) -> Sample:
    """A mosaic of the four images `indices`, turned, scaled, sheared and moved.

    Boxes are cut where their image or the input ends; those of which little is left are dropped. `content` is the
    whole input. UserError: an image cannot be read.
    """
    height, width = size
    (a, b, c), (d, e, f) = affine_of_mosaic(augment, size, rng)[:2].tolist()
    center_x, center_y = (rng.uniform(0.5, 1.5, 2) * (width, height)).tolist()
    tiles = []
    for place, index in enumerate(indices):
        h, w = data.sizes[index].tolist()
        scale, new_h, new_w = fit(h, w, size)
        left = center_x - (new_w if place % 2 == 0 else 0)
        top = center_y - (new_h if place < 2 else 0)
        cut = (
            max(0.0, -left / scale),
            max(0.0, -top / scale),
            min(float(w), (2 * width - left) / scale),
            min(float(h), (2 * height - top) / scale),
        )
        matrix = _after(((a, b, c), (d, e, f)), scale, left, top)
        tiles.append(Tile(index, matrix, cut, scale))
    canvas = new_canvas(size, pad_value)
    for tile in tiles:
        draw(data, tile, canvas)
    boxes, labels, crowd, masks = boxes_of(data, tiles, size)
    height, width = data.sizes[indices[0]].tolist()
    meta = ImageMeta(int(data.image_ids[indices[0]]), data.paths[indices[0]], height, width, math.nan)
    content = np.array([0, 0, size[1], size[0]], np.float32)
    return Sample(_three_channels(canvas), boxes, labels, crowd, content, meta, masks)


def mixup(
    sample: Sample, data: DetectionData, index: int, augment: Augment, pad_value: Color, rng: np.random.Generator
) -> Sample:
    """Blend image `index`, scaled, perhaps mirrored, somewhere, half and half into a sample; the boxes are both's."""
    height, width = sample.image.shape[:2]
    h, w = data.sizes[index].tolist()
    scale = fit(h, w, (height, width))[0]
    factor = rng.uniform(*augment.mixup_scale)
    room = np.array([width, height]) * (1 - factor)
    left, top = rng.uniform(np.minimum(room, 0), np.maximum(room, 0)).tolist()
    side = scale * factor
    mirrored = rng.random() < 0.5
    across = (-side, 0.0, left + side * w) if mirrored else (side, 0.0, left)
    tile = Tile(index, (across, (0.0, side, top)), (0.0, 0.0, float(w), float(h)), scale)
    other = new_canvas((height, width), pad_value)
    draw(data, tile, other)
    image = np.asarray(cv2.addWeighted(sample.image, 0.5, _three_channels(other), 0.5, 0))
    boxes, labels, crowd, masks = boxes_of(data, [tile], (height, width))
    boxes = np.concatenate([sample.boxes, boxes])
    labels, crowd = np.concatenate([sample.labels, labels]), np.concatenate([sample.crowd, crowd])
    masks = None if sample.masks is None or masks is None else sample.masks + masks
    return replace(sample, image=image, boxes=boxes, labels=labels, crowd=crowd, masks=masks)


def draw(data: DetectionData, tile: Tile, canvas: np.ndarray) -> None:
    """Draw a tile's part of its image onto a canvas (H, W, 4). UserError: the image cannot be read."""
    (a, b, c), (d, e, f) = tile.matrix
    x1, y1, x2, y2 = tile.cut
    xs = [a * x + b * y + c for x in (x1, x2) for y in (y1, y2)]
    ys = [d * x + e * y + f for x in (x1, x2) for y in (y1, y2)]
    left, top = max(0, math.floor(min(xs))), max(0, math.floor(min(ys)))
    right, bottom = min(canvas.shape[1], math.ceil(max(xs))), min(canvas.shape[0], math.ceil(max(ys)))
    if right <= left or bottom <= top or x2 - x1 < 1 or y2 - y1 < 1:
        return
    scale = min(math.sqrt(tile.magnification), tile.scale)
    image, reduced = data.read_reduced(tile.index, _reduction(scale))
    column, row = int(x1 / reduced), int(y1 / reduced)
    part = image[row : math.ceil(y2 / reduced), column : math.ceil(x2 / reduced)]
    (a, b, c), (d, e, f) = _after(tile.matrix, reduced, column * reduced, row * reduced)
    # cv2 counts from the middle of the first pixel
    c, f = c - left + (a + b - 1) / 2, f - top + (d + e - 1) / 2
    cv2.warpAffine(
        cv2.cvtColor(part, cv2.COLOR_RGB2RGBA),
        np.array([[a, b, c], [d, e, f]]),
        (right - left, bottom - top),
        dst=canvas[top:bottom, left:right],
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_TRANSPARENT,
    )


def boxes_of(data: DetectionData, tiles: list[Tile], size: Size) -> Boxes:
    """The boxes of tiles on a canvas of `size`, cut where the tile or the canvas ends, if enough of them is left."""
    annotations = [data.annotations(tile.index) for tile in tiles]
    boxes, labels, crowd = (np.concatenate(parts) for parts in zip(*annotations, strict=True))
    tile_of_box = np.repeat(np.arange(len(tiles)), [len(one) for one, _, _ in annotations])
    matrices = np.array([tile.matrix for tile in tiles])[tile_of_box]
    cuts = np.array([tile.cut for tile in tiles])[tile_of_box]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) * np.array([tile.magnification for tile in tiles])[tile_of_box]
    visible = np.minimum(np.maximum(boxes, cuts[:, [0, 1, 0, 1]]), cuts[:, [2, 3, 2, 3]])
    # A box outside the cut has no size, and a turned map would give it one.
    inside = (visible[:, 2:] > visible[:, :2]).all(1)
    corners = visible[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    moved = corners @ matrices[:, :, :2].swapaxes(1, 2) + matrices[:, None, :, 2]
    np.clip(moved, 0, (size[1], size[0]), out=moved)
    upright = np.concatenate([moved.min(1), moved.max(1)], axis=1)
    keep = inside & worth_training(upright, areas, crowd)
    masks = None
    if data.masks is not None:
        every = (placed_masks(data, tile.index, np.array(tile.matrix), tile.cut) for tile in tiles)
        masks = list(compress(chain.from_iterable(every), keep))
    return upright[keep].astype(np.float32), labels[keep], crowd[keep], masks


def _after(matrix: Rows, scale: float, left: float, top: float) -> Rows:
    """`matrix` after an image was scaled and then moved to (left, top)."""
    (a, b, c), (d, e, f) = matrix
    return (a * scale, b * scale, a * left + b * top + c), (d * scale, e * scale, d * left + e * top + f)


def _three_channels(canvas: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.cvtColor(canvas, cv2.COLOR_RGBA2RGB))


def _reduction(scale: float) -> int:
    """The largest fraction a decoder can give that still has a pixel for each pixel shown."""
    return next((factor for factor in (8, 4, 2) if scale * factor <= 1.0), 1)
