"""Messages of image decoders. libjpeg and libpng write to stderr themselves, without the file's name."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_COMPLAINT = re.compile(
    r"corrupt jpeg|premature end of jpeg|invalid (?:jpeg|suspension|sos|crop)|inconsistent progression|unknown adobe"
    r"|unknown jfif|unsupported marker|libpng (?:error|warning)|opencv tiff|grfmt_|loadsave\.cpp|bogus",
    re.IGNORECASE,
)
_files: dict[int, int] = {}  # process -> descriptor of the file that stands in for stderr; a fork has its own


@contextmanager
def complaints() -> Iterator[list[str]]:
    """The lines that decoders print to stderr meanwhile; what else is printed there appears afterwards.

    stderr belongs to the whole process, so only its main thread listens: elsewhere the list stays empty and the lines
    are printed as ever.
    """
    messages: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield messages
        return
    try:
        stderr_copy, stand_in = os.dup(_STDERR), _stand_in()
    except OSError:  # no stderr, or nowhere to put the lines
        yield messages
        return
    start = os.lseek(stand_in, 0, os.SEEK_END)
    os.dup2(stand_in, _STDERR)
    try:
        yield messages
    finally:
        os.dup2(stderr_copy, _STDERR)
        os.close(stderr_copy)
        end = os.lseek(stand_in, 0, os.SEEK_CUR)
        if end > start:
            messages += _pick_complaints(os.pread(stand_in, end - start, start))
            os.ftruncate(stand_in, start)


def _stand_in() -> int:
    process = os.getpid()
    if process not in _files:
        with tempfile.TemporaryFile() as file:
            _files[process] = os.dup(file.fileno())
    return _files[process]


def _pick_complaints(printed: bytes) -> list[str]:
    """The decoders' lines; the others are passed on to stderr."""
    messages = []
    for line in printed.splitlines(keepends=True):
        text = line.decode("utf-8", "replace").strip()
        if _COMPLAINT.search(text):
            messages.append(text)
        else:
            os.write(_STDERR, line)
    return messages
