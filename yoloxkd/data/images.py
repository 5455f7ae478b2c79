"""Image files: read as RGB, and checked for being whole before a run depends on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from yoloxkd.errors import UserError

_JPEG_START, _JPEG_END, _JPEG_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_PNG_START, _PNG_END = b"\x89PNG", b"IEND"
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_2 & ~cv2.IMREAD_COLOR),
    4: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_4 & ~cv2.IMREAD_COLOR),
    8: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_8 & ~cv2.IMREAD_COLOR),
}


def read_image(path: str, size: tuple[int, int] | None = None, reduce: int = 1) -> tuple[np.ndarray, int]:
    """The picture as uint8 (h, w, 3) RGB, and the factor it was really reduced by.

    Grey, alpha and 16-bit pictures come out as 8-bit RGB. `size` is the (height, width) the annotations speak of: the
    EXIF orientation is applied, unless only the picture as stored has that size. `reduce` (1, 2, 4 or 8) decodes a JPEG
    at that fraction, pixel i covering pixels i*reduce to (i+1)*reduce of it; other formats come whole (factor 1).
    UserError: the file is missing, empty, cut short, not an image, or of another size.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the image {path}: {error.strerror or error}") from error
    if fault := _fault_of_content(content):
        raise UserError(f"the image {path} {fault}; replace it or take it out of the data set")
    if not content.startswith(_JPEG_START):
        reduce = 1
    image = _decode(content, _REDUCED[reduce], path)
    if size is None:
        return image, reduce
    wanted = (math.ceil(size[0] / reduce), math.ceil(size[1] / reduce))
    if image.shape[:2] != wanted:
        upright = image.shape[:2]
        image = _decode(content, _REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION, path)
        if image.shape[:2] != wanted:
            found = f"{upright[1] * reduce}x{upright[0] * reduce}"
            said = f"{size[1]}x{size[0]}"
            raise UserError(f"the image {path} is {found} px but its annotation file says {said}; correct one of them")
    return image, reduce


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
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def check_images(paths: Sequence[str], source: str) -> None:
    """Refuse a data set with missing, empty or cut image files before a run starts on it.

    `source` is the annotation file, for the sentence. UserError: the first such file, its fault, and their number.
    """
    with ThreadPoolExecutor(8) as pool:  # threads hide the latency of network file systems
        faults = list(pool.map(_fault_of_file, paths, chunksize=256))
    bad = [(path, fault) for path, fault in zip(paths, faults, strict=True) if fault]
    if bad:
        path, fault = bad[0]
        others = f" (the first of {len(bad)} such files out of {len(paths)})" if len(bad) > 1 else ""
        raise UserError(
            f"the image {path}, listed in {source}, {fault}{others}; replace it or take it out of the data set"
        )
