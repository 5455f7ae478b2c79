"""Transforms of one image and its boxes: letterbox, flip, color, and the affine map of a mosaic.

The color shift is ours: on the same image it takes less than half the time of albumentations' HueSaturationValue.
The rarer color operations (gray, blur, noise) are albumentations', imported when a recipe asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Any

import cv2
import numpy as np

from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.placed_mask import PlacedMask
from yoloxkd.types import ImageMeta, ImageSize

Size = tuple[int, int]
"""(H, W) of the network input, px."""
Color = tuple[int, int, int]

# A box that clipping leaves narrower than this, or with less than this part of its area, is no longer trained on.
_MIN_SIDE_PX, _MIN_PART = 2.0, 0.1


@dataclass(slots=True)
class Sample:
    """One network input and its boxes.

    image    (H, W, 3) uint8 RGB
    boxes    (n, 4) float32, xyxy px of the input
    labels   (n,) int64
    crowd    (n,) bool
    content  (4,) float32, xyxy px: the part of the input that is image, not padding
    meta     where the image came from; of a mosaic, its first image, with a scale of NaN
    masks    of the boxes; None: the data has none, or nobody asked
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    content: np.ndarray
    meta: ImageMeta
    masks: list[PlacedMask] | None = None

    def keep(self, rows: np.ndarray) -> None:
        """Only the boxes `rows` (n,) bool from now on."""
        self.boxes, self.labels, self.crowd = self.boxes[rows], self.labels[rows], self.crowd[rows]
        if self.masks is not None:
            self.masks = list(compress(self.masks, rows))


def fit(height: int, width: int, size: Size) -> tuple[float, int, int]:
    """Scale, new height, new width of an image that fits `size` with its aspect kept; rounded down, as YOLOX does."""
    scale = min(size[0] / height, size[1] / width)
    return scale, max(1, int(height * scale)), max(1, int(width * scale))


def fit_within(height: int, width: int, short: int, long: int) -> tuple[float, int, int]:
    """Scale, new height, new width of an image as large as its two sides may be, rounded to the nearest, as in mmdetection."""
    scale = min(short / min(height, width), long / max(height, width))
    return scale, max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def fit_size(height: int, width: int, imgsz: ImageSize) -> tuple[float, int, int]:
    """Scale, new height, new width of an image for inputs of `imgsz`."""
    return fit(height, width, (imgsz, imgsz)) if isinstance(imgsz, int) else fit_within(height, width, *imgsz)


def up_to_multiple(length: int, multiple: int) -> int:
    """The smallest multiple that is not below a length."""
    return -(-length // multiple) * multiple


def largest_input(imgsz: ImageSize, multiple: int) -> Size:
    """(H, W) of the largest input of `imgsz`, as an image in landscape has it."""
    height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    return up_to_multiple(height, multiple), up_to_multiple(width, multiple)


def network_input(
    image: np.ndarray, imgsz: ImageSize, multiple: int, pad_value: Color
) -> tuple[np.ndarray, float, float, float]:
    """The input of one image (h, w, 3), and scale, left, top as of `letterbox`.

    A square size letterboxes; a pair fits the image within its sides and pads to a multiple of `multiple` px.
    """
    if isinstance(imgsz, int):
        return letterbox(image, (imgsz, imgsz), pad_value)
    scale, height, width = fit_within(image.shape[0], image.shape[1], *imgsz)
    out = blank((up_to_multiple(height, multiple), up_to_multiple(width, multiple)), pad_value)
    out[:height, :width] = cv2.resize(image, (width, height))
    return out, scale, 0.0, 0.0


def blank(size: Size, pad_value: Color) -> np.ndarray:
    """(H, W, 3) uint8 filled with one color; row by row, which is many times faster than broadcasting the color."""
    out = np.empty((*size, 3), np.uint8)
    out.reshape(size[0], -1)[:] = np.tile(np.array(pad_value, np.uint8), size[1])
    return out


def letterbox(image: np.ndarray, size: Size, pad_value: Color) -> tuple[np.ndarray, float, float, float]:
    """Fit an image (h, w, 3) into (H, W, 3), at the top left, the rest filled with `pad_value` (0..255 RGB).

    Gives the input, and scale, left, top: pixel (x, y) of the image lies at (x * scale + left, y * scale + top).
    Bilinear, sizes rounded down, as in YOLOX's `preproc`.
    """
    scale, height, width = fit(image.shape[0], image.shape[1], size)
    resized = image if image.shape[:2] == (height, width) else cv2.resize(image, (width, height))
    if (height, width) == size:
        return (resized.copy() if resized is image else resized), scale, 0.0, 0.0
    out = blank(size, pad_value)
    out[:height, :width] = resized
    return out, scale, 0.0, 0.0


def shift_hsv(image: np.ndarray, hue: int, saturation: int, value: int) -> np.ndarray:
    """Shift hue (-75..75 of 180, cyclic) and saturation and value (0..255, saturating) of an RGB uint8 image.

    A negative hue shift is done with red and blue exchanged, where it is a positive one: a saturating addition is then
    enough, because the way back takes hues of 180 and more modulo 180.
    """
    there, back = cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB
    if hue < 0:
        there, back = cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR
    hsv = cv2.cvtColor(image, there)
    cv2.add(hsv, (abs(hue), saturation, value, 0), dst=hsv)
    return np.asarray(cv2.cvtColor(hsv, back, dst=hsv))


def color(image: np.ndarray, augment: Augment, rng: np.random.Generator) -> np.ndarray:
    """The color operations of a recipe on one RGB uint8 image, drawn from `rng`."""
    if rng.random() < augment.hsv_prob:
        shifts = rng.uniform(-1, 1, 3) * augment.hsv * rng.integers(0, 2, 3)
        hue, saturation, value = shifts.astype(int).tolist()
        if hue or saturation or value:
            image = shift_hsv(image, hue, saturation, value)
    if augment.gray or augment.blur or augment.noise:
        compose = _rarer(augment.gray, augment.blur, augment.noise)
        compose.set_random_seed(int(rng.integers(2**31)))  # else every worker would draw the same
        image = compose(image=image)["image"]
    return image


@lru_cache(maxsize=4)
def _rarer(gray: float, blur: float, noise: float) -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations as A

    steps: list[Callable[..., Any]] = [
        A.ToGray(p=gray),
        A.GaussianBlur(blur_limit=(3, 5), p=blur),
        A.GaussNoise(std_range=(0.01, 0.05), p=noise),
    ]
    return A.Compose(steps)


def flip(image: np.ndarray, boxes: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Left-right mirror of an image and of its boxes (n, 4) in a frame of `width` px."""
    mirrored = boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return np.asarray(cv2.flip(image, 1)), mirrored


def affine_of_mosaic(augment: Augment, size: Size, rng: np.random.Generator) -> np.ndarray:
    """(3, 3) map from the mosaic's canvas, twice the input's size, to the input, in px where pixel i covers i to i + 1.

    The canvas is turned, scaled and sheared about its center, which lands near the center of the input.
    """
    height, width = size
    angle = np.radians(rng.uniform(-augment.degrees, augment.degrees))
    scale = rng.uniform(*augment.scale)
    shear = np.tan(np.radians(rng.uniform(-augment.shear, augment.shear, 2)))
    shift = (0.5 + rng.uniform(-augment.translate, augment.translate, 2)) * (width, height)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    linear = np.array([[1.0, shear[0]], [shear[1], 1.0]]) @ turn
    out = np.eye(3)
    out[:2, :2] = linear
    out[:2, 2] = shift - linear @ (width, height)
    return out


def worth_training(boxes: np.ndarray, whole_areas: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(n,) bool: boxes (n, 4) that cutting left large enough, absolutely and against their whole area (n,) px^2.

    What is to be ignored (`crowd`, (n,) bool) is worth it while anything of it shows: else it would become background.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    least = sides.min(1, initial=np.inf)
    return np.asarray(np.where(crowd, least > 0, (least > _MIN_SIDE_PX) & (sides.prod(1) > _MIN_PART * whole_areas)))
