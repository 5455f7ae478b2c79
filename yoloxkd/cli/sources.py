"""Sources of `yoloxkd predict`: images, folders, globs, video files, a camera."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from yoloxkd.cli.drawn_files import plain_name
from yoloxkd.data.io.find_images import missing
from yoloxkd.data.io.images import IMAGE_SUFFIXES
from yoloxkd.errors import UserError, nearest_file

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
FALLBACK_FPS = 30.0
_LOST = 0.02  # share of a video's frames, by its own count, that may be absent at the end: counts are estimates


class Unreadable(UserError):
    """A source that cannot be read, or not to its end."""


@dataclass(frozen=True, slots=True)
class Source:
    """An image, a video file or a camera; `path` is the file, or the camera's index as text."""

    path: Path
    kind: Literal["image", "video", "camera"]


def find_sources(texts: Iterable[str]) -> list[Source]:
    """Files as they are, folders by their images and videos, globs by what they match, a bare number as a camera.

    UserError: a source with neither image nor video, a folder that cannot be read.
    """
    out: list[Source] = []
    for text in texts:
        path = Path(text)
        if os.path.isdir(path):
            paths = _inside(path)
        elif os.path.isfile(path):
            paths = [path]
        elif re.fullmatch("[0-9]{1,4}", text):
            out.append(Source(path, "camera"))
            continue
        else:
            paths = sorted(Path(p) for p in glob.glob(text, recursive=True) if os.path.isfile(p))
        if not paths:
            raise UserError(f"no image or video at {text}{_hint(text)}")
        out += [Source(p, "video" if p.suffix.lower() in VIDEO_SUFFIXES else "image") for p in paths]
    return out


def _hint(text: str) -> str:
    """Why nothing is there, by what the text looks like."""
    if "://" in text and not text.startswith("file:"):
        return ", which is a URL: download it first, and give the file"
    if os.path.isdir(text):
        return ", a folder with no file that is one (folders in it are not looked into)"
    if glob.has_magic(text):
        return ": no file has that name, and as a pattern it matches none"
    return f": it {missing(text)}{nearest_file(text)}"


def _inside(folder: Path) -> list[Path]:
    """The images and videos of a folder by their names; hidden files (`._x.jpg` of a Mac too) are none."""
    try:
        return sorted(
            p
            for p in folder.iterdir()
            if p.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not p.name.startswith(".") and not p.is_dir()
        )
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from error


@dataclass(slots=True)
class Stream:
    """An opened video or camera: frames a second, and its frames as (h, w, 3) uint8 RGB, one at a time.

    count: how many there will be, by the file's own account; 0: not known
    """

    fps: float
    count: int
    frames: Iterator[np.ndarray]


@contextmanager
def opened(source: Source, limit: int | None) -> Iterator[Stream]:
    """A video or camera, of which at most `limit` frames are read.

    Unreadable: it cannot be opened or has no frame; after the last frame that can be read, that it should have more.
    """
    camera = source.kind == "camera"
    with ExitStack() as links:
        address = int(str(source.path)) if camera else links.enter_context(plain_name(source.path))
        capture = cv2.VideoCapture(address)
        links.callback(capture.release)
        success, first = capture.read() if capture.isOpened() else (False, None)
        if not success:
            what = (
                f"camera {source.path} gives no image" if camera else f"{source.path} is not a video that can be read"
            )
            raise Unreadable(f"{what}; {'is it connected?' if camera else 'convert it, or take it out of the sources'}")
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        length = 0 if camera else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        count = min(length or limit, limit) if limit else length
        yield Stream(fps if 0 < fps < 1000 else FALLBACK_FPS, count, _frames(capture, source, first, limit))


def _frames(capture: Any, source: Source, frame: Any, limit: int | None) -> Iterator[np.ndarray]:
    count = 0
    success = True
    expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if source.kind == "video" else 0
    while success and (limit is None or count < limit):
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        count += 1
        success, frame = capture.read()
    if not success and count != limit and count < expected * (1 - _LOST) - 1:
        raise Unreadable(f"{source.path} is cut short or broken: {count} of its {expected} frames can be read")
