"""TIFF and BigTIFF files by their first directory: size, orientation, kind of samples, and where the pixels lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from yoloxkd.data.io.exif import TAG as ORIENTATION

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _HEIGHT, _BITS, _CHANNELS, _SAMPLES = 256, 257, 258, 277, 339
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = 273, 279, 324, 325
_WANTED = {_WIDTH, _HEIGHT, _BITS, _CHANNELS, _SAMPLES, _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES, ORIENTATION}
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_UNSIGNED = 1
_KIND = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_MOST_ENTRIES = 4096


@dataclass(frozen=True, slots=True)
class TiffHeader:
    """height, width px as stored; orientation: EXIF's; bits of a sample; fault: why the image cannot be read."""

    height: int
    width: int
    orientation: int
    bits: int
    fault: str


def tiff_header(file: BinaryIO, length: int) -> TiffHeader:
    """The first image of a TIFF. ValueError: its directory cannot be read."""
    try:
        tags = _directory(file, length)
        height, width = tags[_HEIGHT][0], tags[_WIDTH][0]
    except (struct.error, KeyError, IndexError, OverflowError):
        raise ValueError("is cut short, or not a TIFF that can be read") from None
    bits = tags.get(_BITS) or (1,)
    kind = (tags.get(_SAMPLES) or (_UNSIGNED,))[0]
    channels = (tags.get(_CHANNELS) or (1,))[0]
    fault = ""
    if kind in _KIND:
        fault = f"is a TIFF of {_KIND[kind]} samples, whose scale is unknown; save it with 8 or 16 unsigned bits"
    elif len(set(bits)) > 1 or bits[0] not in (1, 2, 4, 8, 16):
        fault = f"is a TIFF of {'/'.join(map(str, bits))}-bit samples, which cannot be read; save it with 8 or 16 bits"
    elif channels > 4:
        fault = f"is a TIFF of {channels} channels, which cannot be read; save 1, 3 or 4 of them"
    elif _pixels_end(tags) > length:
        fault = "is cut short"
    orientation = (tags.get(ORIENTATION) or (1,))[0]
    return TiffHeader(height, width, orientation, bits[0], fault)


def _pixels_end(tags: dict[int, tuple[int, ...]]) -> int:
    """The byte behind the last strip or tile."""
    starts = tags.get(_STRIPS) or tags.get(_TILES) or ()
    counts = tags.get(_STRIP_BYTES) or tags.get(_TILE_BYTES) or ()
    return max((start + count for start, count in zip(starts, counts, strict=False)), default=0)


def _directory(file: BinaryIO, length: int) -> dict[int, tuple[int, ...]]:
    """The whole numbers of the wanted tags. struct.error: the file ends before."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = 43 in (head[2], head[3])
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)
    count_format, entry_format = (order + "Q", order + "HHQ8s") if big else (order + "H", order + "HHI4s")
    file.seek(start)
    (count,) = struct.unpack(count_format, file.read(struct.calcsize(count_format)))
    entry = struct.Struct(entry_format)
    block = file.read(entry.size * min(count, _MOST_ENTRIES))
    tags: dict[int, tuple[int, ...]] = {}
    for at in range(0, entry.size * min(count, _MOST_ENTRIES), entry.size):
        tag, kind, number, value = entry.unpack_from(block, at)
        if tag not in _WANTED or kind not in _TYPES:
            continue
        one = struct.calcsize(_TYPES[kind])
        if number * one > len(value):
            if number * one > length:
                raise struct.error
            file.seek(int.from_bytes(value, "little" if order == "<" else "big"))
            value = file.read(number * one)
        tags[tag] = struct.unpack_from(f"{order}{number}{_TYPES[kind]}", value)
    return tags
