"""Headers of image files: upright size, and whether the file can be complete. No pixel is decoded."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from yoloxkd.data.io.exif import TURNED, orientation_of
from yoloxkd.data.io.jpeg import JPEG_END, JPEG_START, jpeg_fault, jpeg_header
from yoloxkd.data.io.tiff import TIFF_STARTS, tiff_header

_HEAD = 1 << 14  # bytes read at first; the size of most files stands within
_FURTHER = 1 << 18
_CUT = "is cut short"
_MOST_PIXELS, _LONGEST_SIDE = 1 << 30, 1 << 20  # what OpenCV decodes
_BY_PILLOW = frozenset({"PPM", "JPEG2000", "AVIF"})  # formats that OpenCV decodes and that are not read here


@dataclass(frozen=True, slots=True)
class Header:
    """height, width px as stored; turned: EXIF exchanges them; fault: why the file cannot be read, empty if it can.

    bits        of a sample; 16 where a PNG or TIFF has more than 8
    plain_jpeg  a JPEG of one scan without restart markers: only decoding tells whether its data is whole
    """

    height: int
    width: int
    turned: bool = False
    fault: str = ""
    plain_jpeg: bool = False
    bits: int = 8

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width px as `images.read_image` gives the image, EXIF orientation applied."""
        return (self.width, self.height) if self.turned else (self.height, self.width)


def read_header(file: BinaryIO, length: int) -> Header:
    """The header of an image file of `length` bytes, by its content, whatever its name.

    OSError: it cannot be read. ValueError: it is no image whose size can be found, and why.
    """
    head = file.read(_HEAD)
    native_header = None
    for start, parse in _PARSERS:
        if head.startswith(start):
            try:
                native_header = parse(head, file, length)
            except (struct.error, IndexError):
                raise ValueError(_CUT) from None
            break
    header = native_header or _by_pillow(head, file)
    if header.height < 1 or header.width < 1:
        raise ValueError("is not an image that can be read: its size is 0")
    if header.height * header.width > _MOST_PIXELS or max(header.height, header.width) > _LONGEST_SIDE:
        raise ValueError(f"is {header.width}x{header.height} px, more than can be decoded; cut it into tiles")
    return header


def image_size(path: str) -> tuple[int, int]:
    """Height and width px of an image file as `images.read_image` gives it, EXIF orientation applied, without decoding.

    OSError: it cannot be read. ValueError: it is no image whose size can be found.
    """
    with Path(path).open("rb") as file:
        return read_header(file, file.seek(0, 2) + file.seek(0)).upright


def no_image(head: bytes) -> str:
    """What a file is that starts like this and is no image that is known."""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run 'git lfs pull'"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), not an image"
    if not head.strip(b"\0"):
        return "holds nothing but zeros, not an image"
    return "is not an image that can be read"


def _jpeg(head: bytes, file: BinaryIO, length: int) -> Header:
    header = jpeg_header(head)
    content = head
    while header is None and len(content) < length:
        more = file.read(_FURTHER)
        if not more:
            break
        content += more
        header = jpeg_header(content)
    if header is None or not header.height or not header.width:
        raise ValueError("is cut short within its header, or is not a JPEG that can be read")
    fault = header.fault
    file.seek(-2, 2)
    plain = header.one_scan and not header.interval and file.read(2) == JPEG_END
    if not plain and not fault:
        file.seek(0)
        fault = jpeg_fault(file.read())
    return Header(header.height, header.width, header.orientation in TURNED, fault, header.one_scan and not fault)


def _png(head: bytes, file: BinaryIO, length: int) -> Header:
    width, height = struct.unpack_from(">II", head, 16)
    at, turned = 8, False
    while True:
        file.seek(at)
        start = file.read(8)
        if len(start) < 8:
            return Header(height, width, turned, _CUT)
        size, kind = struct.unpack(">I4s", start)
        at += 12 + size
        if at > length or not kind.isalpha():
            return Header(height, width, turned, _CUT if at > length else "is damaged: its PNG chunks break off")
        if kind == b"eXIf":
            turned = orientation_of(file.read(size)) in TURNED
        if kind == b"IEND":
            return Header(height, width, turned, bits=head[24])


def _bmp(head: bytes, file: BinaryIO, length: int) -> Header:
    size, _, start, kind = struct.unpack_from("<IIII", head, 2)
    if kind == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", head, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", head, 18)
    if compression in (1, 2):  # run lengths
        cut = size > length
    else:
        row = (width * bits + 31) // 32 * 4
        cut = start + row * abs(height) - 3 > length  # some writers leave out the padding of the last row
    return Header(abs(height), width, fault=_CUT if cut else "")


def _gif(head: bytes, file: BinaryIO, length: int) -> Header:
    width, height = struct.unpack_from("<HH", head, 6)
    file.seek(0)
    content = file.read()
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0)
    whole = False
    while at < len(content) and not whole:
        is_image = content[at : at + 1] == b"\x2c"
        if is_image:
            flags = content[at + 9] if at + 9 < len(content) else 0
            at += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif content[at] == 0x21:
            at += 2
        else:
            break
        while at < len(content) and content[at]:
            at += 1 + content[at]
        whole = is_image and at < len(content)
        at += 1
    return Header(height, width, fault="" if whole else _CUT)


def _webp(head: bytes, file: BinaryIO, length: int) -> Header | None:
    if head[8:12] != b"WEBP":
        return None
    end, kind = 8 + struct.unpack_from("<I", head, 4)[0], head[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8L":
        bits = struct.unpack_from("<I", head, 21)[0]
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 26))
    at, turned, cut = 12, False, end > length
    while at + 8 <= end and not cut:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        cut = at + 8 + size > end or not name.strip().isalnum()
        if name == b"EXIF" and not cut:
            turned = orientation_of(file.read(size).removeprefix(b"Exif\0\0")) in TURNED
        at += 8 + size + size % 2
    return Header(height, width, turned, _CUT if cut else "")


def _tiff(head: bytes, file: BinaryIO, length: int) -> Header:
    header = tiff_header(file, length)
    return Header(header.height, header.width, header.orientation in TURNED, header.fault, bits=header.bits)


def _by_pillow(head: bytes, file: BinaryIO) -> Header:
    from PIL import Image, UnidentifiedImageError

    file.seek(0)
    try:
        with Image.open(file, formats=sorted(_BY_PILLOW)) as image:
            width, height = image.size
            return Header(height, width, image.getexif().get(0x0112) in TURNED)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError):
        raise ValueError(no_image(head)) from None


_PARSERS: tuple[tuple[bytes, Callable[[bytes, BinaryIO, int], Header | None]], ...] = (
    (JPEG_START, _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"BM", _bmp),
    (b"GIF8", _gif),
    (b"RIFF", _webp),
    *((start, _tiff) for start in TIFF_STARTS),
)
