"""JPEG files by their segments (ITU T.81, annex B): the header, and whether every scan is there."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

from yoloxkd.data.io.exif import orientation_of

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_READ_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})  # baseline, extended and progressive
_PROGRESSIVE = frozenset({0xC2, 0xCA})
_SCAN, _END, _INTERVAL, _EXIF, _ADOBE = 0xDA, 0xD9, 0xDD, 0xE1, 0xEE
_AFTER_DATA = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the marker that ends entropy-coded data
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_CUT = "is cut short"
_PADDING = bytes(16)  # what libjpeg may look ahead; it can stand for no more than a few blocks


@dataclass(slots=True)
class JpegHeader:
    """height, width px as stored; adobe: has Adobe's marker; orientation: EXIF's, 1 without; interval: MCUs between
    restart markers, 0 without; sampling: (horizontal, vertical) factors of each component by its id; scanned: the
    components of the first scan."""

    height: int = 0
    width: int = 0
    adobe: bool = False
    orientation: int = 1
    frame: int = 0
    precision: int = 8
    interval: int = 0
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    scanned: int = 0

    @property
    def components(self) -> int:
        return len(self.sampling)

    @property
    def fault(self) -> str:
        """Why no decoder here reads such a file; empty when one does."""
        if self.frame not in _READ_FRAMES:
            return "is a lossless or hierarchical JPEG, which cannot be read; save it as a plain one"
        if self.precision != 8:
            return f"is a JPEG of {self.precision} bits, which cannot be read; save it with 8 bits"
        return ""

    @property
    def one_scan(self) -> bool:
        """Whether a single scan holds the whole image."""
        return self.frame not in _PROGRESSIVE and self.scanned == self.components

    def take(self, marker: int, content: bytes, body: int, end: int) -> None:
        """What a segment says; content[body:end] is its payload."""
        if marker in _FRAMES and not self.frame and body + 6 <= len(content):
            self.frame = marker
            self.precision, self.height, self.width, count = struct.unpack_from(">BHHB", content, body)
            part = content[body + 6 : body + 6 + 3 * count]
            self.sampling = {part[i]: (part[i + 1] >> 4, part[i + 1] & 15) for i in range(0, len(part) - 2, 3)}
        elif marker == _INTERVAL:
            self.interval = int.from_bytes(content[body : body + 2])
        elif marker == _ADOBE and content[body : body + 5] == b"Adobe":
            self.adobe = True
        elif marker == _EXIF and content[body : body + 6] == b"Exif\0\0":
            self.orientation = orientation_of(content[body + 6 : end])


def _segments(content: bytes, at: int = 2) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end of its payload) of the segments from `at` on; a scan's entropy-coded data is passed over.

    The last is the end marker; without it the content ends early.
    """
    while at + 2 <= len(content):
        at = content.find(b"\xff", at)
        if at < 0 or at + 2 > len(content):
            return
        marker = content[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes, and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _END:
            yield marker, at + 2, at + 2
            return
        length = int.from_bytes(content[at + 2 : at + 4])
        if length < 2:
            return
        yield marker, at + 4, at + 2 + length
        at += 2 + length
        if marker == _SCAN:
            marker_match = _AFTER_DATA.search(content, at)
            at = marker_match.start() if marker_match else len(content)


def jpeg_header(content: bytes) -> JpegHeader | None:
    """The header of a JPEG up to its first scan; None when `content` ends before."""
    header = JpegHeader()
    for marker, body, end in _segments(content):
        if marker == _SCAN and header.frame and body < len(content):
            header.scanned = content[body]
            return header
        header.take(marker, content, body, end)
    return None


def jpeg_fault(content: bytes) -> str:
    """Why a JPEG is not whole as far as its segments tell, or nothing; what follows its end marker does not matter.

    Told: the end marker of the image itself (not of a thumbnail) is missing, scans of components or of progressive
    refinements are missing, a scan has fewer restart markers than its interval asks for.
    """
    header, scans = JpegHeader(), _Scans()
    ended = False
    for marker, body, end in _segments(content):
        if marker == _SCAN:
            marker_match = _AFTER_DATA.search(content, end)
            if marker_match is None or not scans.add(header, content, body, end, marker_match.start()):
                return _CUT
        ended = marker == _END
        header.take(marker, content, body, end)
    return "" if ended and scans.complete(header) else _CUT


class _Scans:
    """How far each coefficient of each component was coded: the lowest bit that is still to come."""

    def __init__(self) -> None:
        self.bits_left: dict[int, list[int]] = {}

    def add(self, header: JpegHeader, content: bytes, body: int, end: int, data_end: int) -> bool:
        """Take a scan's header; False where its data has too few restart markers."""
        count = content[body] if body < end <= len(content) else 0
        if not count or end - body < 4 + 2 * count:
            return False
        ids = [content[body + 1 + 2 * i] for i in range(count)]
        first, last, bits = content[end - 3 : end]
        for component in ids:
            bits_left = self.bits_left.setdefault(component, [99] * 64)
            bits_left[first : min(last, 63) + 1] = [bits & 15] * (min(last, 63) + 1 - first)
        if not header.interval:
            return True
        restarts = sum(1 for _ in _RESTART.finditer(content, end, data_end))
        return restarts >= -(-_units(header, ids) // header.interval) - 1

    def complete(self, header: JpegHeader) -> bool:
        return all(not any(self.bits_left.get(component, [99])) for component in header.sampling)


def _units(header: JpegHeader, ids: list[int]) -> int:
    """MCUs of a scan of these components; at least 1."""
    wide = max((h for h, _ in header.sampling.values()), default=1) or 1
    high = max((v for _, v in header.sampling.values()), default=1) or 1
    if len(ids) > 1:
        return ceil(header.width / (8 * wide)) * ceil(header.height / (8 * high))
    h, v = header.sampling.get(ids[0], (wide, high))
    return ceil(ceil(header.width * h / wide) / 8) * ceil(ceil(header.height * v / high) / 8)


def data_is_whole(content: bytes) -> bool:
    """Whether the one scan of a JPEG holds all of its blocks; True where there are several scans.

    Decoders fill what is missing before an end marker with gray. Without the marker they ask for more, and Pillow,
    having no more, says so; an eighth of the size is decoded.
    """
    from PIL import JpegImagePlugin

    header = jpeg_header(content)
    if header is None or not header.one_scan or header.fault:
        return True
    start = next(end for marker, _, end in _segments(content) if marker == _SCAN)
    marker_match = _AFTER_DATA.search(content, start)
    try:
        image = JpegImagePlugin.JpegImageFile(
            io.BytesIO(content[: marker_match.start() if marker_match else None] + _PADDING)
        )
        image.draft("L", (1, 1))
        image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
