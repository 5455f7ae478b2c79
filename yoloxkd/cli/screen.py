"""Screen output that survives any name, encoding, full disk or closed pipe."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Forgiving(io.RawIOBase):
    """A descriptor that writes nowhere once it cannot be written to, as after `| head -1`, and remembers why.

    The work goes on, because the files that a command writes are worth more than its lines on the screen.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self.fault: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, content: Any) -> int:
        try:
            return os.write(self._number, content)
        except OSError as error:
            self.fault = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._number)
            os.close(nowhere)
            return len(content)


def make_forgiving() -> None:
    """Characters that stdout or stderr cannot hold are written as \\xe9; one that cannot be written to stops nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper and not isinstance(_raw(stream), _Forgiving):
            try:
                raw = _Forgiving(stream.fileno())
            except OSError:  # not a file of the system: somebody gathers the text
                continue
            encoding, by_line = stream.encoding, stream.line_buffering
            whole = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(whole, encoding, "backslashreplace", line_buffering=by_line))


def fault() -> str | None:
    """Write what waits for stdout; the reason where some of it could not be written. A reader who left is none."""
    sys.stdout.flush()
    error = getattr(_raw(sys.stdout), "fault", None)
    return None if error is None or isinstance(error, BrokenPipeError) else error.strerror or str(error)


def _raw(stream: Any) -> Any:
    return getattr(getattr(stream, "buffer", None), "raw", None)
