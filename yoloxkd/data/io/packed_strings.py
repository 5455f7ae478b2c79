"""Many strings packed into two arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class Strings(Sequence[str]):
    """A fixed list of strings held as one block of bytes and where each starts.

    No Python object stands for a string, so worker processes that share this memory with their parent never write to it:
    counting references to a list's strings would make each of them a copy of its own.
    """

    __slots__ = ("_block", "_starts")

    def __init__(self, values: Iterable[str]) -> None:
        parts = [value.encode("utf-8", "surrogateescape") for value in values]
        lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._block = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Strings: ...
    def __getitem__(self, index: int | slice) -> str | Strings:
        if isinstance(index, slice):
            return Strings(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        start, end = self._starts[index % len(self)], self._starts[index % len(self) + 1]
        return self._block[start:end].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({list(self[:3])}{', ...' if len(self) > 3 else ''})"


def readable(path: str) -> str:
    """A path as any encoder takes it: bytes that are not UTF-8, as file names may hold, are shown as \ufffd."""
    return path if path.isascii() else path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
