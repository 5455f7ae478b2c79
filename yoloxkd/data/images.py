"""Image files: read as RGB, and checked for being whole before a run depends on them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import cv2
import numpy as np

from yoloxkd.data.faults import MISSING, UNREADABLE, Faults, Place
from yoloxkd.data.headers import image_size, jpeg_header
from yoloxkd.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
Result = TypeVar("Result")
_MISSING = "is missing"
_PORTION = 256  # files a thread takes at a time
_JPEG_START, _JPEG_END, _JPEG_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_PNG_START, _PNG_END = b"\x89PNG", b"IEND"
_TIFF_STARTS = (b"II*\0", b"MM\0*")
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_2 & ~cv2.IMREAD_COLOR),
    4: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_4 & ~cv2.IMREAD_COLOR),
    8: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_8 & ~cv2.IMREAD_COLOR),
}


class WrongSize(UserError):
    """A picture has another size than its annotation file says."""


def read_image(path: str, size: tuple[int, int] | None = None, reduce: int = 1) -> tuple[np.ndarray, int]:
    """The picture as uint8 (h, w, 3) RGB, and the factor it was really reduced by.

    Grey, palette, CMYK (Adobe's inverted one too) and 16-bit pictures come out as 8-bit RGB, of 16 bits the upper 8;
    alpha is dropped, the colours under it stay. `size` is the (height, width) the annotations speak of: the EXIF
    orientation is applied, unless only the picture as stored has that size. `reduce` (1, 2, 4 or 8) decodes a JPEG at
    that fraction, pixel i covering pixels i*reduce to (i+1)*reduce of it; other formats come whole (factor 1).
    UserError: the file is missing, empty, cut short, not an image, or of another size.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror or error}") from error
    return decode_image(content, path, size, reduce)


def decode_image(
    content: bytes, path: str, size: tuple[int, int] | None = None, reduce: int = 1
) -> tuple[np.ndarray, int]:
    """As `read_image`, of a file's bytes; `path` is for the sentences. WrongSize: the picture has another size."""
    if fault := _fault_of_content(content):
        raise UserError(f"the image {path} {fault}; replace it or take it out of the data set")
    decode = _decoder(content)
    if not content.startswith(_JPEG_START) or decode is not _decode:
        reduce = 1
    image = decode(content, _REDUCED[reduce], path)
    if size is None:
        return image, reduce
    wanted = (math.ceil(size[0] / reduce), math.ceil(size[1] / reduce))
    if image.shape[:2] != wanted:
        upright = image.shape[:2]
        image = decode(content, _REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION, path)
        if image.shape[:2] != wanted:
            found = f"{upright[1] * reduce}x{upright[0] * reduce}"
            said = f"{size[1]}x{size[0]}"
            raise WrongSize(f"the image {path} is {found} px but its annotation file says {said}; correct one of them")
    return image, reduce


def _decoder(content: bytes) -> Callable[[bytes, int, str], np.ndarray]:
    """OpenCV, but for what it gets wrong: CMYK that is not inverted, and alpha in a TIFF, which it blends with black."""
    if content.startswith(_TIFF_STARTS):
        return _decode_tiff
    if content.startswith(_JPEG_START):
        header = jpeg_header(content)
        if header is not None and header.components == 4 and not header.adobe:
            return _decode_plain_cmyk
    return _decode


def _decode_tiff(content: bytes, flags: int, path: str) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.mode in ("RGBA", "RGBX", "LA", "PA"):
                return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError):
        pass
    return _decode(content, flags, path)


def _decode_plain_cmyk(content: bytes, flags: int, path: str) -> np.ndarray:
    """A CMYK JPEG without Adobe's marker: 255 is full ink. Pillow inverts all of them, as Adobe's need it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = image if flags & cv2.IMREAD_IGNORE_ORIENTATION else ImageOps.exif_transpose(image)
            light = np.asarray(upright).astype(np.uint16)  # Pillow's ink, 255 less what is stored: here, the light left
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not an image that can be read; replace it or take it out of the data set"
        ) from error
    return ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)


def _decode(content: bytes, flags: int, path: str) -> np.ndarray:
    try:
        image: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{path} is not an image that can be read; replace it or take it out of the data set")
    return image


def _fault_of_content(content: bytes) -> str | None:
    """Why these bytes are no whole image, or None. Decoders fill a cut JPEG with grey instead of failing."""
    if not content:
        return "is empty"
    if content.startswith(_JPEG_START) and not content.endswith(_JPEG_END):
        # Bytes may follow the end marker, and a thumbnail has an end marker of its own, so the last scan decides:
        # inside its data 0xff is always escaped.
        if content.rfind(_JPEG_END) < content.rfind(_JPEG_SCAN):
            return "is cut short"
    elif content.startswith(_PNG_START) and content.rfind(_PNG_END) < 0:
        return "is cut short"
    return None


def _fault_of_file(path: str) -> str | None:
    """Like `_fault_of_content`, reading the whole file only when its last bytes leave doubt."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
            if head.startswith(_JPEG_START):
                file.seek(-2, 2)
                if file.read(2) == _JPEG_END:
                    return None
            elif head and not head.startswith(_PNG_START):
                return None
            file.seek(0)
            return _fault_of_content(file.read())
    except FileNotFoundError:
        return _MISSING
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def in_threads(function: Callable[[str], Result], files: Sequence[str]) -> list[Result]:
    """function of every file, in order; threads hide the latency of network file systems."""

    def some(start: int) -> list[Result]:
        return [function(files[i]) for i in range(start, min(start + _PORTION, len(files)))]

    with ThreadPoolExecutor(8) as pool:
        return [one for part in pool.map(some, range(0, len(files), _PORTION)) for one in part]


def check_images(paths: Sequence[str], source: str) -> None:
    """Refuse a data set with missing, empty or cut image files before a run starts on it.

    `source` is the annotation file, for the sentence. UserError: the first such file, its fault, and their number.
    """
    faults = in_threads(_fault_of_file, paths)
    bad = [(path, fault) for path, fault in zip(paths, faults, strict=True) if fault]
    if bad:
        path, fault = bad[0]
        others = f" (the first of {len(bad)} such files out of {len(paths)})" if len(bad) > 1 else ""
        raise UserError(
            f"the image {path}, listed in {source}, {fault}{others}; replace it or take it out of the data set"
        )


def measure_images(paths: Sequence[str], source: str, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (N, 2) of image files by their headers, height and width px as `read_image` gives them; which are good (N,).

    For formats that do not say sizes. `source` is where the files are listed. UserError: a file is missing, empty, cut
    short or no image; while gathering, all such files are recorded and counted as not good.
    """
    if not faults.gather:
        check_images(paths, source)
    found = in_threads(_size_or_fault, paths)
    for path, one in zip(paths, found, strict=True):
        if isinstance(one, str):
            sentence = f"the image {path}, listed in {source}, {one}; replace it or take it out of the data set"
            faults.refuse(MISSING if one == _MISSING else UNREADABLE, Place(path, note=one), sentence)
    good = np.array([not isinstance(one, str) for one in found], bool)
    return np.array([(0, 0) if isinstance(one, str) else one for one in found], np.int32).reshape(-1, 2), good


def _size_or_fault(path: str) -> tuple[int, int] | str:
    if fault := _fault_of_file(path):
        return fault
    try:
        return image_size(path)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except ValueError as error:
        return str(error)
