"""Images given to `Detector.predict` by Python users, as (h, w, 3) uint8 RGB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from yoloxkd.data.io.images import read_image
from yoloxkd.errors import UserError

ACCEPTED = (
    "a file name, a PIL image, an array of uint8 RGB (h, w, 3) or gray (h, w), or a tensor of uint8 RGB (3, h, w) or gray "
    "(1, h, w)"
)


def given_images(images: Any) -> Iterator[np.ndarray]:
    """One image for each image given: (h, w, 3) uint8 RGB.

    images is one image or anything that yields images (a list, a tuple, a generator, mixed as they come); an array
    (n, h, w, 3) or a tensor (n, 3, h, w) is n images. An image is one of

        str, Path      an image file, turned upright as its EXIF data say
        PIL image      of any mode, as it is (not turned)
        NumPy array    uint8 (h, w, 3) RGB, (h, w) or (h, w, 1) gray; uint16 by its upper 8 bits
        torch tensor   uint8 (3, h, w) RGB or (1, h, w) gray, on any device; uint16 by its upper 8 bits

    A PIL image's alpha is dropped, as a file's is. UserError: anything else, saying which image it was; float pixels
    too, whose range (0 to 1 or 0 to 255) only the user knows, and four channels, whose order only the user knows.
    """
    if _is_one(images):
        yield _rgb_array(images, "the image")
        return
    if not isinstance(images, Iterable) or isinstance(images, bytes | bytearray | dict):
        raise UserError(f"the image is {_description(images)}; give {ACCEPTED}, or a list of these")
    for number, image in enumerate(images, start=1):
        yield _rgb_array(image, f"image {number}")


def _is_one(images: Any) -> bool:
    if isinstance(images, str | Path | Image.Image):
        return True
    dimensions = getattr(images, "ndim", None)
    return (
        dimensions is not None
        and dimensions != 4
        and getattr(getattr(images, "dtype", None), "kind", None) not in ("O", "U")
    )


def _rgb_array(image: Any, which: str) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_image(str(image))[0]
    if isinstance(image, Image.Image):
        return _of_pil(image, which)
    array = _array(image)
    if array is None:
        raise UserError(f"{which} is {_description(image)}; give {ACCEPTED}")
    if array.dtype not in (np.uint8, np.uint16):
        hint = "; scale it to 0..255 and convert it to uint8" if array.dtype.kind == "f" else ""
        raise UserError(f"{which} is {_description(image)}{hint}; give {ACCEPTED}")
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise UserError(f"{which} is {_description(image)}; give {ACCEPTED}")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array)


def _of_pil(image: Image.Image, which: str) -> np.ndarray:
    try:
        if image.mode.startswith("I;16") or image.mode == "I":
            values = np.asarray(image)
            if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
                raise UserError(
                    f"{which} is a PIL image of mode {image.mode} with values beyond 0 to 65535; give {ACCEPTED}"
                )
            return _rgb_array(values.astype(np.uint16), which)
        if image.mode == "F":
            raise UserError(f"{which} is a PIL image of mode F, whose range is not known; give {ACCEPTED}")
        rgb = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # Pillow reads the pixels of an opened file only now
        raise UserError(f"{which} is a PIL image that cannot be read: {error}") from error
    if not rgb.size:
        raise UserError(f"{which} is a PIL image of {image.width}x{image.height} px; give {ACCEPTED}")
    return rgb


def _array(image: Any) -> np.ndarray | None:
    """An array with its channels last; None: the object is neither an array nor a tensor."""
    if isinstance(image, np.ndarray):
        return image
    if not hasattr(image, "detach"):
        return None
    tensor = image.detach().cpu()
    if str(tensor.dtype) not in ("torch.uint8", "torch.uint16"):
        return np.zeros(tuple(tensor.shape), np.float32 if tensor.is_floating_point() else np.int64)
    array: np.ndarray = tensor.numpy()
    return array.transpose(1, 2, 0) if array.ndim == 3 else array


def _description(image: Any) -> str:
    if image is None:
        return "None, which is what cv2.imread gives for a file that it cannot read"
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if shape is not None and dtype is not None:
        kind = "an array" if isinstance(image, np.ndarray) else "a tensor"
        return f"{kind} of {str(dtype).removeprefix('torch.')} and shape {tuple(shape)}"
    return f"of type {type(image).__name__}"
