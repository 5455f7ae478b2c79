"""Read image files as RGB, and check that they are complete."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from yoloxkd.data.io.decoder_messages import complaints
from yoloxkd.data.io.find_images import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from yoloxkd.data.io.find_images import missing
from yoloxkd.data.io.image_headers import Header, read_header
from yoloxkd.data.io.jpeg import JPEG_START, data_is_whole, jpeg_header
from yoloxkd.data.io.packed_strings import readable
from yoloxkd.data.io.threads import in_threads
from yoloxkd.data.io.tiff import TIFF_STARTS
from yoloxkd.data.problems import MISSING, UNREADABLE, Faults, Place
from yoloxkd.errors import UserError

logger = logging.getLogger(__name__)

_REMEDY = "replace it or leave it out"
_FILLED = np.array([63, 64, 65, 127, 128, 129], np.uint8)  # gray of a JPEG, or CMYK JPEG, whose data ends early
_DECODED, _OPENED = 16 * 2**20, 32 * 2**10  # bytes of JPEGs that are decoded before a run, and what opening one adds
_REDUCED = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_2 & ~cv2.IMREAD_COLOR),
    4: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_4 & ~cv2.IMREAD_COLOR),
    8: cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_REDUCED_COLOR_8 & ~cv2.IMREAD_COLOR),
}
_DEEP, _DARK = 16, 16  # bits of a sample; the upper 8 of them where no more than 12 are used
_complained: set[str] = set()  # files whose complaints were told
_dark: list[str] = []  # the file that stands for those of 16 bits that use no more than 12


class WrongSize(UserError):
    """An image has another size than its annotation file says."""


def read_image(path: str, size: tuple[int, int] | None = None, reduce: int = 1) -> tuple[np.ndarray, int]:
    """The image as uint8 (h, w, 3) RGB, and the factor it was really reduced by.

    Gray, palette, CMYK (Adobe's inverted one too) and 16-bit images come out as 8-bit RGB, of 16 bits the upper 8;
    alpha is dropped, the colors under it stay. `size` is the (height, width) the annotations speak of: the EXIF
    orientation is applied, unless only the image as stored has that size. `reduce` (1, 2, 4 or 8) decodes a JPEG at
    that fraction, pixel i covering pixels i*reduce to (i+1)*reduce of it; other formats come whole (factor 1).
    UserError: the file is missing, empty, cut short, not an image, or of another size.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"cannot read the image {path or repr(path)}: {error.strerror or error}") from error
    except ValueError as error:  # a zero byte, or what no file system can encode
        raise UserError(f"cannot read the image {path!r}: {error}") from error
    return decode_image(content, path, size, reduce)


def decode_image(
    content: bytes, path: str, size: tuple[int, int] | None = None, reduce: int = 1
) -> tuple[np.ndarray, int]:
    """As `read_image`, of a file's bytes; `path` is for the sentences. WrongSize: the image has another size."""
    try:
        header = read_header(io.BytesIO(content), len(content))
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    if header.fault:
        raise _unreadable(path, header.fault)
    decode = _decoder(content)
    if not content.startswith(JPEG_START) or decode is not _decode:
        reduce = 1
    with complaints() as messages:
        image, reduce = _of_size(decode, content, path, size, reduce)
    if messages and path not in _complained:
        _complained.add(path)
        logger.warning(
            "the image %s is damaged: its decoder says '%s'; replace it", readable(path), "', '".join(messages)
        )
    if header.bits == _DEEP and 0 < image.max() < _DARK:
        _warn_of_dark(path)
    return image, reduce


def _warn_of_dark(path: str) -> None:
    """Once a process: a set of such images has thousands."""
    if not _dark:
        _dark.append(path)
        logger.warning(
            "the image %s has 16 bits and values below 4096 alone, so that it comes out nearly black, as others may: "
            "if 4095 is its white, multiply its values by 16",
            readable(path),
        )


def _of_size(
    decode: Callable[[bytes, int, str], np.ndarray],
    content: bytes,
    path: str,
    size: tuple[int, int] | None,
    reduce: int,
) -> tuple[np.ndarray, int]:
    image = decode(content, _REDUCED[reduce], path)
    if size is None:
        return image, reduce
    expected = (math.ceil(size[0] / reduce), math.ceil(size[1] / reduce))
    if image.shape[:2] != expected:
        upright = image.shape[:2]
        image = decode(content, _REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION, path)
        if image.shape[:2] != expected:
            raise WrongSize(
                f"the image {path} {_other_size((upright[0] * reduce, upright[1] * reduce), size)}; correct one of them"
            )
    return image, reduce


def _other_size(size: tuple[int, int], annotated_size: tuple[int, int]) -> str:
    """Sizes are height, width px."""
    swapped = " (width and height exchanged)" if size == annotated_size[::-1] else ""
    return f"is {size[1]}x{size[0]} px but its annotation file says {annotated_size[1]}x{annotated_size[0]}{swapped}"


def _unreadable(path: str, fault: str) -> UserError:
    return UserError(f"the image {path} {fault}; {_REMEDY}")


def _decoder(content: bytes) -> Callable[[bytes, int, str], np.ndarray]:
    """OpenCV, but for what it gets wrong: CMYK that is not inverted, and alpha in a TIFF, which it blends with black."""
    if content.startswith(TIFF_STARTS):
        return _decode_tiff
    if content.startswith(JPEG_START):
        header = jpeg_header(content)
        if header is not None and header.components == 4 and not header.adobe:
            return _decode_plain_cmyk
    return _decode


def _decode_tiff(content: bytes, flags: int, path: str) -> np.ndarray:
    from PIL import TiffImagePlugin

    try:
        # not Image.open, which refuses large images
        with TiffImagePlugin.TiffImageFile(io.BytesIO(content)) as image:
            if image.mode in ("RGBA", "RGBX", "LA", "PA"):
                return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        pass
    return _decode(content, flags, path)


def _decode_plain_cmyk(content: bytes, flags: int, path: str) -> np.ndarray:
    """A CMYK JPEG without Adobe's marker: 255 is full ink. Pillow inverts all of them, as Adobe's need it."""
    from PIL import ImageOps, JpegImagePlugin

    try:
        with JpegImagePlugin.JpegImageFile(io.BytesIO(content)) as image:
            upright = image if flags & cv2.IMREAD_IGNORE_ORIENTATION else ImageOps.exif_transpose(image)
            light = np.asarray(upright).astype(np.uint16)  # Pillow's ink, 255 less what is stored: here, the light left
    except (OSError, ValueError, SyntaxError) as error:
        raise _unreadable(path, "is not an image that can be read") from error
    _refuse_gray(255 - light, content, path)
    return ((light[..., :3] * light[..., 3:] + 127) // 255).astype(np.uint8)


def _decode(content: bytes, flags: int, path: str) -> np.ndarray:
    try:
        image: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise _unreadable(path, "is not an image that can be read")
    if content.startswith(JPEG_START):
        _refuse_gray(image, content, path)
    return image


def _refuse_gray(image: np.ndarray, content: bytes, path: str) -> None:
    """Refuse a JPEG whose data ends early: decoders fill the rest, and so one of the corners, with gray."""
    corners = image[:: max(1, len(image) - 1), :: max(1, image.shape[1] - 1)]
    if np.isin(corners, _FILLED).all(-1).any() and not data_is_whole(content):
        raise _unreadable(path, "is cut short")


@dataclass(frozen=True, slots=True)
class _FileCheck:
    """What a file's header tells; no header: it is missing or no image, and `fault` says how."""

    fault: str
    header: Header | None = None
    length: int = 0

    @property
    def density(self) -> float:
        """Bytes a pixel."""
        return self.length / math.prod(self.header.upright) if self.header else 0.0


def _check_file(path: str) -> _FileCheck:
    try:
        with open(path, "rb") as file:
            length = file.seek(0, 2) + file.seek(0)
            header = read_header(file, length)
            return _FileCheck(header.fault, header, length)
    except FileNotFoundError:
        return _FileCheck(missing(path))
    except OSError as error:
        return _FileCheck(f"cannot be read ({error.strerror or error})")
    except ValueError as error:
        return _FileCheck(str(error))


def _check_files(paths: Sequence[str], decode: bool) -> list[_FileCheck]:
    """Of every file its header; with `decode`, JPEGs whose data may end early are decoded, as far as that takes some tenths of a
    second.

    Those with the fewest bytes a pixel come first: so has a part of a JPEG with an end marker.
    """
    checks = in_threads(_check_file, paths)
    if not decode:
        return checks
    plain = [(i, one) for i, one in enumerate(checks) if one.header is not None and one.header.plain_jpeg]
    plain.sort(key=lambda pair: pair[1].density)
    work = np.cumsum([0, *(one.length + _OPENED for _, one in plain)]).tolist()
    sparse = [i for (i, _), before in zip(plain, work[:-1], strict=True) if before < _DECODED]
    for i, good in zip(sparse, in_threads(_data_is_whole, [paths[i] for i in sparse]), strict=True):
        if not good:
            checks[i] = _FileCheck("is cut short", checks[i].header)
    return checks


def _data_is_whole(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return data_is_whole(file.read())
    except OSError:
        return False


def check_images(paths: Sequence[str], source: str, sizes: np.ndarray | None = None) -> None:
    """Refuse a data set with image files that are missing, broken or of another size before a run starts on it.

    source  the annotation file, for the sentence
    sizes   (N, 2) height and width px that it says; None: it says none
    UserError: the first such file, its fault, and their number.
    """
    bad = []
    for i, (path, one) in enumerate(zip(paths, _check_files(paths, decode=True), strict=True)):
        fault, remedy = one.fault, _REMEDY
        if not fault and sizes is not None and one.header is not None:
            annotated_size, header = tuple(sizes[i].tolist()), one.header
            if annotated_size not in (header.upright, (header.height, header.width)):
                fault, remedy = _other_size(header.upright, annotated_size), "correct one of them"
        if fault:
            bad.append((path, fault, remedy))
    if bad:
        path, fault, remedy = bad[0]
        raise UserError(f"the image {path}, listed in {source}, {fault}{_others(len(bad), len(paths))}; {remedy}")


def _others(bad: int, paths: int) -> str:
    return f" (the first of {bad} such files out of {paths})" if bad > 1 else ""


def measure_images(paths: Sequence[str], source: str, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (N, 2) of image files by their headers, height and width px as `read_image` gives them; which are good (N,).

    For formats that do not say sizes. `source` is where the files are listed. UserError: a file is missing, empty, cut
    short or no image; while gathering, all such files are recorded and counted as not good.
    """
    checks = _check_files(paths, decode=not faults.gather)
    bad = [(path, one.fault) for path, one in zip(paths, checks, strict=True) if one.fault]
    others = _others(len(bad), len(paths))
    for path, fault in bad:
        sentence = f"the image {path}, listed in {source}, {fault}{others}; {_REMEDY}"
        faults.refuse(MISSING if not os.path.exists(path) else UNREADABLE, Place(path, note=fault), sentence)
    good = np.array([not one.fault for one in checks], bool)
    sizes = [(0, 0) if one.header is None else one.header.upright for one in checks]
    return np.array(sizes, np.int32).reshape(-1, 2), good
