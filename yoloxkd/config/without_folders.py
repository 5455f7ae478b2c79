"""Texts for others: of an absolute path the name of the file, for the folders tell of the machine alone."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

Value = TypeVar("Value")

_ROOT = r"(?:~|[A-Za-z]:(?=[\\/]))?[\\/]"
_PART = r"[^\s\\/:'\",;<>|()\[\]]+"
_PATH = re.compile(rf"(?<![\w.~/\\:-]){_ROOT}(?:{_PART}[\\/])+({_PART})?[\\/]?")
_WHOLE = re.compile(rf"{_ROOT}(?:[^\\/\n]+[\\/])*[^\\/\n]+[\\/]?")


def without_folders(value: Value, known_paths: Sequence[str] = (), inside: str | Path | None = None) -> Value:
    """A text, or every text in containers, with each absolute path cut to its last part; relative ones stay.

    Args:
        value: Text, list, tuple or dict; other values stay as they are.
        known_paths: Absolute paths that may stand in sentences; without this a blank ends a path there.
        inside: Folder; the path of a file in it becomes relative to it.

    Example:
        >>> without_folders({"data": "/home/me/birds/data.yaml", "note": "no file /home/me/a.pt, see runs/a"})
        {'data': 'data.yaml', 'note': 'no file a.pt, see runs/a'}
    """
    result: Any = value
    if isinstance(value, str):
        result = _text(value if inside is None else value.replace(f"{inside}{os.sep}", ""), known_paths)
    elif isinstance(value, dict):
        result = {key: without_folders(each, known_paths, inside) for key, each in value.items()}
    elif isinstance(value, list | tuple):
        parts = [without_folders(each, known_paths, inside) for each in value]
        result = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return cast("Value", result)


def distinct_names(files: Sequence[str]) -> list[str]:
    """Names of files side by side: relative paths as they are, of an absolute one the shortest end that no other has.

    Example:
        >>> distinct_names(["/a/plain/best.pt", "/a/fgd/best.pt", "teacher.pt"])
        ['plain/best.pt', 'fgd/best.pt', 'teacher.pt']
    """
    parts = [Path(file).parts for file in files]
    names = []
    for file, file_parts in zip(files, parts, strict=True):
        ends = (n for n in range(1, len(file_parts)) if sum(other[-n:] == file_parts[-n:] for other in parts) == 1)
        names.append(str(Path(*file_parts[-next(ends, len(file_parts)) :])) if Path(file).is_absolute() else file)
    return names


def command_without_folders(command: str) -> str:
    """A command line, as `without_folders`: each argument, and what stands behind its equals signs."""
    try:
        words = [[without_folders(part) for part in word.split("=")] for word in shlex.split(command)]
    except ValueError:  # changed by hand, to quotes without an end
        return without_folders(command)
    return shlex.join("=".join(parts) for parts in words)


def _text(text: str, known_paths: Sequence[str]) -> str:
    if _WHOLE.fullmatch(text):
        return _last(text)
    for path in sorted(known_paths, key=len, reverse=True):
        if len(re.findall(r"[\\/]", path)) > 1:  # not the root, nor a folder in it
            text = re.sub(rf"(?<![\w.~/\\:-]){re.escape(path)}(?![\w-])", _last(path), text)
    return _PATH.sub(lambda match: _last(match[0]), text)


def _last(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
