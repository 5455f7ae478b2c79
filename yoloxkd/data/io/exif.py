"""EXIF orientation of an image."""

from __future__ import annotations

import struct

TAG = 0x0112
TURNED = (5, 6, 7, 8)  # orientations that exchange height and width


def orientation_of(block: bytes) -> int:
    """The orientation in an EXIF block (a TIFF structure), 1 where it is missing or broken."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(order + "I", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, start)
        for i in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", block, start + 2 + 12 * i)
            if tag == TAG:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
