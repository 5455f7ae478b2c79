"""One training at a time in a run's folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from yoloxkd.errors import UserError

LOCK = ".lock"
"""File in the run's folder while a training is at work there."""


@contextmanager
def claimed(folder: Path, other: Callable[[], Path] | None = None) -> Iterator[Path]:
    """Hold a run's folder, made if it is not there, until the block ends; one that is empty then goes again.

    Args:
        folder: Of the run.
        other: Gives the next folder to try where this one is there already, of a run whose name nobody chose. None: the
            folder may be there.

    Raises:
        UserError: Another training is at work in the folder, or it cannot be made.
    """
    made: list[Path] = []
    while not made and (other is not None or not folder.is_dir()):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True)
            made = missing
        except FileExistsError:
            folder = other() if other is not None else folder
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    try:
        with _held(folder):
            yield folder
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder's lock, whose file is deleted at the end. A folder that cannot be written to has none."""
    try:
        descriptor = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT)
    except OSError:  # what must be written there says so itself
        yield
        return
    try:
        _lock(descriptor, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(folder / LOCK)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """A record lock, which children of the process do not inherit. No lock where the system or the disk has none."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"another training is at work in {folder}; wait for its end, or give another --out"
            ) from error
