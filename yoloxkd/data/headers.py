"""What the first bytes of an image file say: its size upright, and how its colours are stored."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_HEAD = 1 << 16  # bytes read at first; the size of most files stands within
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """height, width px as stored; components 1, 3 or 4; adobe: has Adobe's marker; orientation: EXIF's, 1 without."""

    height: int
    width: int
    components: int
    adobe: bool
    orientation: int


def jpeg_header(content: bytes) -> JpegHeader | None:
    """The header of a JPEG (ITU T.81, annex B) up to its first frame; None when `content` ends before."""
    at, adobe, orientation = 2, False, 1
    while at + 4 <= len(content):
        if content[at] != 0xFF:
            return None
        marker = content[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7:  # fill bytes, and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(content[at + 2 : at + 4])
        body = at + 4
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if body + 6 > len(content):
                return None
            height, width, components = struct.unpack_from(">xHHB", content, body)
            return JpegHeader(height, width, components, adobe, orientation)
        if marker == 0xDA or length < 2:
            return None
        if marker == 0xEE and content[body : body + 5] == b"Adobe":
            adobe = True
        elif marker == 0xE1 and content[body : body + 6] == b"Exif\0\0":
            orientation = _exif_orientation(content[body + 6 : at + 2 + length])
        at += 2 + length
    return None


def _exif_orientation(block: bytes) -> int:
    """The orientation in a TIFF block, 1 where it is missing or broken."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, start)
        for i in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", block, start + 2 + 12 * i)
            if tag == _EXIF_ORIENTATION:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def image_size(path: str) -> tuple[int, int]:
    """Height and width px of an image file as `images.read_image` gives it, EXIF orientation applied, without decoding.

    OSError: it cannot be read. ValueError: it is no image whose size can be found.
    """
    with Path(path).open("rb") as file:
        head = file.read(_HEAD)
        if head.startswith(b"\xff\xd8"):
            found = jpeg_header(head) or jpeg_header(head + file.read())
            if found is None or not found.height or not found.width:
                raise ValueError("is not a JPEG that can be read")
            size = found.height, found.width
            return size[::-1] if found.orientation in _TURNED else size
    return _by_pillow(path)


def _by_pillow(path: str) -> tuple[int, int]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow turns a TIFF's size itself
            turned = image.format != "TIFF" and image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    except UnidentifiedImageError as error:
        raise ValueError("is not an image that can be read") from error
    return (width, height) if turned else (height, width)
