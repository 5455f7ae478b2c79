"""Drawn images and videos of `yoloxkd predict`, marked so that nothing of the user's is replaced."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import cv2
import numpy as np

from yoloxkd.errors import UserError
from yoloxkd.write_image import encoded

MARK = b"drawn by yoloxkd predict"
DIGESTS = ".written-by-yoloxkd.json"
"""The file in `labels/` with the digests of what is there."""
_AFTER_PNG_HEADER = 33  # bytes of the signature and of the IHDR chunk
_NEAR = 256  # bytes at either end of a file in which the mark is looked for


def is_drawn(file: Path) -> bool:
    """Whether `yoloxkd predict` has drawn this image or video."""
    try:
        with open(file, "rb") as stream:
            first = stream.read(_NEAR)
            stream.seek(-min(_NEAR, os.fstat(stream.fileno()).st_size), os.SEEK_END)
            return MARK in first + stream.read()
    except OSError:
        return False


def is_drawn_text(file: Path, digests: Mapping[str, str]) -> bool:
    """Whether a label file in `labels/` belongs to a drawn image or video beside that folder, and nobody changed it.

    digests  what `read_digests` finds in `labels/`
    """
    try:
        if digests.get(file.name) not in (None, text_digest(file.read_text(encoding="utf-8"))):
            return False
    except (OSError, ValueError):
        return False
    stem, _, number = file.stem.rpartition("_")
    stems = [file.stem, *([stem] if number.isdigit() else [])]
    return any(
        is_drawn(file.parent.parent / f"{s}{suffix}") for s in stems for suffix in (".jpg", ".jpeg", ".png", ".mp4")
    )


def text_digest(text: str) -> str:
    """By which a label file is known again: people correct labels by hand, and corrections are theirs."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_digests(labels: Path) -> dict[str, str]:
    """File name -> digest of each label file that `yoloxkd predict` has written there; those of a killed run are not known."""
    try:
        digests = json.loads((labels / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return digests if isinstance(digests, dict) else {}


def write_image_file(path: Path, pixels: np.ndarray) -> None:
    """(h, w, 3) uint8 RGB as a JPEG or PNG file with the mark. UserError: it cannot be written."""
    try:
        content = encoded(pixels, path.suffix)
        if path.suffix == ".png":
            chunk = b"tEXtComment\0" + MARK
            chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
            at = _AFTER_PNG_HEADER
        else:
            chunk = b"\xff\xfe" + struct.pack(">H", len(MARK) + 2) + MARK
            at = 2  # after the marker that starts a JPEG
        path.write_bytes(content[:at] + chunk + content[at:])
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from error


class VideoFile:
    """Frames (h, w, 3) uint8 RGB, written as MPEG-4; the file gets its name when `close` is called."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        self.path, self.size = path, size
        self._part = path.with_name(f".{os.getpid()}.part.mp4")
        self._links = ExitStack()
        name = self._links.enter_context(plain_name(self._part))
        self._writer = cv2.VideoWriter(name, cv2.VideoWriter_fourcc(*"mp4v"), fps, (size[1], size[0]))  # type: ignore[attr-defined]
        if not self._writer.isOpened():
            self._links.close()
            self._part.unlink(missing_ok=True)
            raise UserError(f"could not write the video {path}; is the folder writable?")

    def write(self, frame: np.ndarray) -> None:
        """A frame of another size than the first is fitted to it: a video file has one size."""
        if frame.shape[:2] != self.size:
            frame = cv2.resize(frame, (self.size[1], self.size[0]), interpolation=cv2.INTER_AREA)
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()
        self._links.close()
        try:
            with open(self._part, "ab") as file:  # a box that players step over
                file.write(struct.pack(">I4s", 8 + len(MARK), b"free") + MARK)
            os.replace(self._part, self.path)
        except OSError as error:
            raise UserError(f"could not write {self.path}: {error.strerror or error}") from error


@contextmanager
def plain_name(path: Path) -> Iterator[str]:
    """A name of a file for OpenCV's video functions, which take UTF-8 only: the path itself, or one through a link."""
    try:
        str(path).encode()
        yield str(path)
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory(prefix="yoloxkd-") as folder:
            link = Path(folder) / f"file{path.suffix}"
            if path.exists():
                link.symlink_to(path.resolve())
                yield str(link)
            else:
                link.symlink_to(path.parent.resolve())
                yield str(link / path.name)
