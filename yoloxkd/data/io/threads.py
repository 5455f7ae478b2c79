"""Thread pool over many files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
_THREADS = 8
_PORTION = 256  # files a thread takes at a time


def in_threads(function: Callable[[str], Result], files: Sequence[str]) -> list[Result]:
    """function of every file, in order; threads hide the latency of network file systems."""

    portion = max(1, min(_PORTION, len(files) // _THREADS))

    def some(start: int) -> list[Result]:
        return [function(files[i]) for i in range(start, min(start + portion, len(files)))]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [one for part in pool.map(some, range(0, len(files), portion)) for one in part]
