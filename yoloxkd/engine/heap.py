"""Memory that a training step on the CPU gives back, kept for the next step (glibc).

glibc asks the system anew for every block above 32 MiB and returns it when it is freed. The system hands such memory out in
zeroed pages of 4 KiB, one interruption each: maps at 640 px cost a tenth of a training step so.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, from malloc.h."""
_USUAL = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 64 * 2**20}
"""glibc's own values; of the second, which grows with what a program frees, the highest."""
_USERS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Variables by which a user sets the same."""


@contextmanager
def kept_heap() -> Iterator[None]:
    """A block in which freed memory stays with this process; at its end what is free goes back to the system.

    Nothing where the C library is not glibc, or where the environment sets its allocator.
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in _USERS):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            libc.mallopt(parameter, value)
        give_back()


def give_back() -> None:
    """Return freed memory to the system. Nothing where the C library is not glibc."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
