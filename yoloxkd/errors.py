"""Errors that a user can cause: one sentence with the fault, the place and the remedy."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_ENTRIES = 10_000  # of a folder, among which a misspelt name is looked for


class UserError(Exception):
    """A mistake the user can mend. The command line prints its sentence without a traceback and exits 2.

    Example:
        >>> print(UserError("no model 'yolox-nanno'; did you mean 'yolox-nano'?"))
        no model 'yolox-nanno'; did you mean 'yolox-nano'?
    """

    exit_code = 2
    agreed = False
    """Whether every process of a distributed run raises the same; one of them prints it then."""

    def __str__(self) -> str:
        """One line that a terminal can show; a name of the user's may hold line ends and control characters."""
        line = " ".join(super().__str__().splitlines())
        if line.isprintable():
            return line
        return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _code(c) for c in line)


class GateError(UserError):
    """A check that failed (export parity, teacher gate, non-finite losses). The command line exits 3."""

    exit_code = 3
    agreed = True


class Interrupted(UserError):
    """The run was asked to stop (Ctrl-C, SIGTERM); its state is in last.pt. The command line exits 130."""

    exit_code = 130
    agreed = True


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


def nearest(name: str, known_names: Iterable[str], say_all: int = 12) -> str:
    """The tail of an "unknown name" sentence: the closest known name, or the list of them when it is short.

    >>> nearest("yolox-nanno", ["yolox-nano", "yolox-s"])
    "did you mean 'yolox-nano'?"
    """
    options = sorted(known_names)
    if close := hint(name, options):
        return close.removeprefix("; ")
    shown = ", ".join(options[:say_all]) + (", ..." if len(options) > say_all else "")
    return f"known: {shown or 'none'}"


def hint(name: str, known_names: Iterable[str]) -> str:
    """What a sentence that lists the known names ends with when one of them is close; else nothing.

    >>> hint("fp15", ["fp16", "bf16"])
    "; did you mean 'fp16'?"
    """
    options = sorted(known_names)
    close = difflib.get_close_matches(str(name), options, n=len(options) or 1, cutoff=0.6)
    if not close:
        return ""
    # of a name with two letters exchanged, the one with the same letters
    best = next((each for each in close if sorted(each) == sorted(str(name))), close[0])
    return f"; did you mean '{best}'?"


def nearest_file(path: str | Path) -> str:
    """The tail of a "no such file" sentence: the path of the closest names that there are; nothing where none is close."""
    place = Path()
    for part in Path(path).parts:
        if not os.path.lexists(place / part):
            try:
                names = [entry.name for entry in islice(os.scandir(place), _ENTRIES)]
            except OSError:
                return ""
            part = next(iter(difflib.get_close_matches(part, names, n=1)), "")
            if not part:
                return ""
        place /= part
    return "" if place == Path(path) else f"; did you mean '{place}'?"
