"""The image that detections were made on, read again when it is drawn on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.data.io.given_images import given_images
from yoloxkd.errors import UserError


class GivenImage:
    """An image as it was given to `Detector.predict`: a path, or a reference to an array, a tensor or a PIL image.

    Call it for the (h, w, 3) uint8 RGB pixels. A pickle of it holds a path, and of anything else nothing.
    """

    __slots__ = ("image",)

    def __init__(self, image: Any) -> None:
        self.image = image

    def __call__(self) -> np.ndarray:
        """UserError: the file is not there any more, or the pixels did not come along."""
        if self.image is None:
            raise UserError("these detections came without the pixels they were made on: give the image, plot(image)")
        return next(given_images(self.image))

    def __reduce__(self) -> tuple[type[GivenImage], tuple[Any]]:
        return GivenImage, (self.image if isinstance(self.image, str | Path) else None,)


def with_origin(images: Any) -> Iterator[tuple[np.ndarray, GivenImage]]:
    """Pixels and origin of each image given; as `given_images`, which says what is taken."""
    origins: list[Any] = []

    def record_origins() -> Iterator[Any]:
        for image in images:
            origins.append(image)
            yield image

    if not _several(images):
        origins.append(images)
    for pixels in given_images(record_origins() if _several(images) else images):
        yield pixels, GivenImage(origins.pop())


def _several(images: Any) -> bool:
    if not isinstance(images, Iterable) or isinstance(images, str | bytes | bytearray | dict):
        return False
    return getattr(images, "ndim", 4) == 4 or getattr(getattr(images, "dtype", None), "kind", None) in ("O", "U")
