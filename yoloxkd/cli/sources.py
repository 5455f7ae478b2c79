"""What `yoloxkd predict` looks at: images, folders, globs, video files, a camera."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from yoloxkd.data.images import IMAGE_SUFFIXES
from yoloxkd.errors import UserError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
FALLBACK_FPS = 30.0


@dataclass(frozen=True, slots=True)
class Source:
    """A picture, a video file or a camera; `path` is the file, or the camera's index as text."""

    path: Path
    kind: Literal["image", "video", "camera"]


def find_sources(given: Iterable[str]) -> list[Source]:
    """Files as they are, folders by their pictures and videos, globs by what they match, a bare number as a camera.

    UserError: a source with neither picture nor video.
    """
    out: list[Source] = []
    for text in given:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        elif path.is_file():
            found = [path]
        elif text.isdigit():
            out.append(Source(path, "camera"))
            continue
        else:
            found = sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(
                f"no image or video at {text}: no such file, an empty folder, or a pattern that matches nothing"
            )
        out += [Source(p, "video" if p.suffix.lower() in VIDEO_SUFFIXES else "image") for p in found]
    return out


@dataclass(slots=True)
class Stream:
    """An opened video or camera: frames a second, and its frames as (h, w, 3) uint8 RGB, one at a time."""

    fps: float
    frames: Iterator[np.ndarray]


@contextmanager
def opened(source: Source, limit: int | None) -> Iterator[Stream]:
    """A video or camera, of which at most `limit` frames are read. UserError: it cannot be opened, or has no frame."""
    camera = source.kind == "camera"
    capture = cv2.VideoCapture(int(str(source.path)) if camera else str(source.path))
    try:
        good, first = capture.read() if capture.isOpened() else (False, None)
        if not good:
            what = (
                f"camera {source.path} gives no picture" if camera else f"{source.path} is not a video that can be read"
            )
            raise UserError(f"{what}; {'is it connected?' if camera else 'convert it, or take it out of the sources'}")
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        yield Stream(fps if 0 < fps < 1000 else FALLBACK_FPS, _frames(capture, first, limit))
    finally:
        capture.release()


def _frames(capture: Any, frame: Any, limit: int | None) -> Iterator[np.ndarray]:
    count = 0
    good = True
    while good and (limit is None or count < limit):
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        count += 1
        good, frame = capture.read()
