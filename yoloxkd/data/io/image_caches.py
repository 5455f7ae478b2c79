"""Caches of decoded images, in memory or on disk.

What is kept is exactly what the decoder gave, at each reduction that was asked for: samples are the same with a cache and
without. A cache fills as images are read; nothing is decoded before training starts.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import multiprocessing
import os
import shutil
import struct
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from yoloxkd.cache_folders import make_cache_folder
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.io.images import read_image
from yoloxkd.errors import UserError

logger = logging.getLogger(__name__)

Kind = Literal["off", "ram", "disk"]
REDUCTIONS = (1, 2, 4, 8)
RAM_SHARE, DISK_SHARE = 0.8, 0.9
"""Of what is free, the most that a cache may take."""
RECENT_BYTES = 256 * 2**20
_EMPTY, _THERE, _WHOLE = 0, 1, 2
_HEADER = struct.Struct("<8sQQIII")  # magic, bytes and mtime (ns) of the source, height, width, reduction
_MAGIC = b"yoloxkd1"


class RamCache:
    """ImageColumns in one block of memory that forked workers share: each is decoded once, by whoever needs it first.

    Two workers that decode the same image at once write the same bytes. Memory is taken as images arrive.
    reductions  those that will be asked for
    """

    def __init__(self, data: DetectionData, reductions: Sequence[int] = REDUCTIONS) -> None:
        self.paths, self.sizes, self.reductions = data.paths, data.sizes, tuple(reductions)
        amounts = image_bytes(data.sizes, self.reductions)
        self.starts = np.concatenate([[0], np.cumsum(amounts.ravel())]).astype(np.int64)
        self.block = np.frombuffer(mmap.mmap(-1, max(1, int(self.starts[-1]))), np.uint8)
        self.states = np.frombuffer(mmap.mmap(-1, max(1, amounts.size)), np.uint8)[: amounts.size].reshape(
            amounts.shape
        )

    def read(self, index: int, reduce: int) -> tuple[np.ndarray, int]:
        """As `DetectionData.read_reduced`; the image is not to be written to."""
        slot = self.reductions.index(reduce)
        if self.states[index, slot] == _WHOLE:
            slot = 0
        if self.states[index, slot] == _THERE:
            return self._view(index, slot), self.reductions[slot]
        size = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        image, factor = read_image(self.paths[index], size, reduce)
        if factor != reduce:  # a format that is always decoded whole
            self.states[index, slot], slot = _WHOLE, 0
        view = self._view(index, slot)
        view.flags.writeable = True
        view[:] = image
        view.flags.writeable = False
        self.states[index, slot] = _THERE
        return view, factor

    def _view(self, index: int, slot: int) -> np.ndarray:
        height, width = (math.ceil(side / self.reductions[slot]) for side in self.sizes[index].tolist())
        start = self.starts[index * len(self.reductions) + slot]
        view = self.block[start : start + height * width * 3].reshape(height, width, 3)
        view.flags.writeable = False
        return view


class RecentImages:
    """The images that one process decoded last; the oldest goes first. A copy in another process starts empty.

    count, limit  at most so many, and at most so many bytes
    """

    def __init__(self, data: DetectionData, count: int, limit: int = RECENT_BYTES) -> None:
        self.paths, self.sizes, self.count, self.limit = data.paths, data.sizes, count, limit
        self.images: dict[tuple[int, int], tuple[np.ndarray, int]] = {}
        self.bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"images": {}, "bytes": 0}

    def read(self, index: int, reduce: int) -> tuple[np.ndarray, int]:
        """As `DetectionData.read_reduced`; the image is not to be written to."""
        entry = self.images.get((index, reduce))
        if entry is not None:
            return entry
        size = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        entry = read_image(self.paths[index], size, reduce)
        entry[0].flags.writeable = False
        self.images[index, reduce] = entry
        self.bytes += entry[0].nbytes
        while len(self.images) > self.count or self.bytes > self.limit:
            self.bytes -= self.images.pop(next(iter(self.images)))[0].nbytes
        return entry


class DiskCache:
    """ImageColumns as files of raw pixels in one folder, each named after its source's path.

    A file says which size and time of change its source had; when the source has others it is decoded again. Files are
    written under another name and renamed, so that any number of runs can share the folder.
    """

    def __init__(self, data: DetectionData, folder: Path) -> None:
        self.paths, self.sizes, self.folder = data.paths, data.sizes, folder
        self.writes = True

    def read(self, index: int, reduce: int) -> tuple[np.ndarray, int]:
        """As `DetectionData.read_reduced`; the image is not to be written to."""
        path, size = self.paths[index], (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        try:
            source = os.stat(path)
        except OSError:
            return read_image(path, size, reduce)  # which says what is wrong
        stamp = (source.st_size, source.st_mtime_ns)
        cached = self._cached_image(self._file(path, reduce), stamp, size, reduce)
        if cached is None:
            image, factor = read_image(path, size, reduce)
            self._keep(self._file(path, reduce), stamp, image if factor == reduce else image[:0], factor)
            return image, factor
        return cached if cached[0].size else self.read(index, 1)  # a format that is always decoded whole

    def _file(self, path: str, reduce: int) -> Path:
        return (
            self.folder
            / f"{hashlib.sha1(os.path.abspath(path).encode('utf-8', 'surrogateescape')).hexdigest()}-{reduce}"
        )

    @staticmethod
    def _cached_image(
        file: Path, stamp: tuple[int, int], size: tuple[int, int], reduce: int
    ) -> tuple[np.ndarray, int] | None:
        """The image in a file, empty where the format cannot be reduced; None: there is none, or an old or broken one."""
        try:
            with open(file, "rb", buffering=0) as stream:
                content = stream.read()
        except OSError:
            return None
        if len(content) < _HEADER.size:
            return None
        magic, *file_stamp, height, width, reduced = _HEADER.unpack_from(content)
        if magic != _MAGIC or tuple(file_stamp) != stamp or len(content) != _HEADER.size + height * width * 3:
            return None
        if height and (height, width, reduced) != (*(math.ceil(side / reduce) for side in size), reduce):
            return None  # of an annotation file with another size
        return np.frombuffer(content, np.uint8, offset=_HEADER.size).reshape(height, width, 3), reduced

    def _keep(self, file: Path, stamp: tuple[int, int], image: np.ndarray, reduced: int) -> None:
        if not self.writes:
            return
        part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            with open(part, "wb", buffering=0) as stream:
                stream.write(_HEADER.pack(_MAGIC, *stamp, *image.shape[:2], reduced))
                stream.write(np.ascontiguousarray(image).data)
            os.replace(part, file)
        except OSError as error:
            self.writes = False
            part.unlink(missing_ok=True)
            logger.warning("the image cache %s cannot be written (%s); it stays as it is", self.folder, error)


def image_bytes(sizes: np.ndarray, reductions: Sequence[int]) -> np.ndarray:
    """(N, 2) height and width px -> (N, R) bytes of the decoded images at each reduction."""
    sides = -(-sizes[:, None].astype(np.int64) // np.array(reductions)[:, None])
    return np.asarray(sides.prod(2) * 3)


def with_cache(
    train: DetectionData, val: DetectionData, kind: Kind, workers: int
) -> tuple[DetectionData, DetectionData, str]:
    """Both splits with a cache in front of their images, and a sentence for the log, empty without a cache.

    Of `val` only whole images are kept. UserError: the images do not fit, or the cache cannot be made.
    """
    if kind == "off":
        return train, val, ""
    splits = ((train, REDUCTIONS), (val, REDUCTIONS[:1]))
    needed = sum(int(image_bytes(data.sizes, reductions).sum()) for data, reductions in splits)
    count = f"{len(train) + len(val)} decoded images"
    if kind == "ram":
        if workers and multiprocessing.get_start_method() != "fork":
            raise UserError("engine.cache ram needs workers that are forked; use engine.cache=disk, or --workers 0")
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # every process of a machine has its own
        _refuse_beyond(needed, available_memory(), RAM_SHARE, f"engine.cache ram: the {count}", "of memory", "disk")
        first, second = (replace(data, cache=RamCache(data, reductions)) for data, reductions in splits)
        return first, second, f"cache: {count} in memory, {_amount(needed)} when all are read"
    folder = image_folder()
    there = sum(file.stat().st_size for file in os.scandir(folder))
    free = shutil.disk_usage(folder).free + there
    _refuse_beyond(needed, free, DISK_SHARE, f"engine.cache disk: the {count}", f"on the disk of {folder}", "off")
    first, second = (replace(data, cache=DiskCache(data, folder)) for data, _ in splits)
    return first, second, f"cache: {count} in {folder}, {_amount(needed)} when all are read"


def image_folder() -> Path:
    """Where decoded images are kept: `images` in the cache folder (see `places`), made if it is not there."""
    return make_cache_folder("pictures")


def available_memory() -> int:
    """Bytes that can still be taken: the machine's, or the container's where that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def _refuse_beyond(needed: int, free: int, share: float, what: str, where: str, instead: str) -> None:
    if needed > share * free:
        raise UserError(
            f"{what} take up to {_amount(needed)}, and {_amount(free)} {where} are free, of which a cache may take "
            f"{share:.0%}; use engine.cache={instead}" + (" or off" if instead == "disk" else "")
        )


def _amount(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
