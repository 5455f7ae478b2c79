"""Atomic file writes: to a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from yoloxkd.errors import UserError
from yoloxkd.output_paths import is_device

_TEMPORARY = re.compile(r"\..+\.\d+\.part", re.DOTALL)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which gets the name `path` when the block ends without an error.

    The rename itself is flushed too, so that after a loss of power the folder holds the old file or the new one. When the
    disk is full or the folder read-only the previous file survives and a UserError says so. A link stays and what it
    leads to is replaced; a device or a pipe is written to.
    """
    if is_device(path):
        with open(path, "wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    beginning = os.fsdecode(os.fsencode(path.name)[:100])  # the whole name may be as long as a name can be
    temporary = path.with_name(f".{beginning}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if _write_failed(error):
            raise UserError(_sentence(path, error)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """A small UTF-8 text file, by `replacing`. Bytes of a file name that are no UTF-8 are written as \\udcXX."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def clear_leftovers(folder: Path) -> int:
    """Delete the temporary files that a killed run left in its folder and in `plots/` there; their number.

    Only names as `replacing` makes them: the folder may hold other things of the user, and other runs below it.
    """
    leftovers = [
        p for parent in (folder, folder / "plots") for p in parent.glob(".*.part") if _TEMPORARY.fullmatch(p.name)
    ]
    for path in leftovers:
        with contextlib.suppress(OSError):
            path.unlink()
    return len(leftovers)


def _write_failed(error: BaseException) -> bool:
    """An OSError, or what torch's zip writer makes of one."""
    zip_writer = isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    )
    return isinstance(error, OSError) or zip_writer


def _sentence(path: Path, error: BaseException) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    what = "checkpoint" if path.suffix == ".pt" else "file"
    intact = f"; the previous {what} is intact" if path.exists() else ""
    return f"could not write {path}: {reason} (is the disk full or the folder read-only?){intact}"


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
