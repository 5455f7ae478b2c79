"""Turn machine failures into user errors: out of memory, a dead loader process, a full disk."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from yoloxkd.data.worker_death import dead_worker
from yoloxkd.errors import UserError

_NO_MEMORY = ("out of memory", "allocate memory", "insufficient memory", "alloc_failed", "unable to allocate")
_NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO)
_ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGT]i?B)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (on any device), NumPy, OpenCV or Python did not get the memory they asked for."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and any(words in str(error).lower() for words in _NO_MEMORY)


@contextmanager
def memory_advice(doing: str, remedy: str) -> Iterator[None]:
    """Turn an allocation that fails in the block into one sentence.

    doing   what failed, with its size ("a training step of 16 images of 640 px")
    remedy  what to lower
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory in {doing}{_requested_memory(error)}; {remedy}") from error


def explain(error: BaseException, out: Path) -> UserError | None:
    """The sentence for an error that comes from the machine and not from the program; None for all others."""
    if isinstance(error, UserError):
        return None
    if (reason := dead_worker(error)) is not None:
        return UserError(reason)
    if is_out_of_memory(error):
        return UserError(f"out of memory{_requested_memory(error)}; lower --batch, --imgsz or --workers")
    if isinstance(error, OSError) and error.errno in _NO_WRITING:
        where = error.filename or out
        return UserError(
            f"could not use {where}: {error.strerror} (is the disk full or the folder read-only?); "
            "make room or choose another --out"
        )
    return None


def _requested_memory(error: BaseException) -> str:
    """ " when 1.5 GiB more were asked for", where the error says how much."""
    amount = _ASKED.search(str(error))
    if amount is None:
        return ""
    number, unit = amount.groups()
    if unit.lower() == "bytes":
        number, unit = f"{float(number) / 2**30:.2f}", "GiB"
    return f" when {number} {unit} more were asked for"
