"""Tables of the package: typed mappings from a name to what is imported on first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import TypeVar, cast

from yoloxkd.errors import UserError, nearest

T = TypeVar("T")


class Table(MutableMapping[str, T]):
    """Names and what they stand for. Names can be listed without importing anything; an entry is imported when it is read.

    Args:
        kind: what an entry is, for the sentence about an unknown name.
        entries: `MODULE:ATTRIBUTE` by name, in the order in which they are listed.

    Example:
        >>> table: Table[type] = Table("container", {"deque": "collections:deque"})
        >>> list(table)
        ['deque']
        >>> table["deque"].__name__
        'deque'
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries: dict[str, tuple[str, T | None]] = {name: (path, None) for name, path in entries.items()}

    def __getitem__(self, name: str) -> T:
        path, entry = self._entries[name]
        if entry is None:
            module, _, attribute = path.partition(":")
            entry = cast(T, getattr(import_module(module), attribute))
            self._entries[name] = path, entry
        return entry

    def __setitem__(self, name: str, entry: T) -> None:
        self._entries[name] = "", entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: str, where: str = "") -> T:
        """The entry of a name that a user typed.

        Args:
            name: as typed.
            where: what follows the name in the sentence, such as " in the recipe".

        Raises:
            UserError: there is no such entry; the sentence has the nearest name.
        """
        if name not in self._entries:
            raise UserError(f"unknown {self.kind} '{name}'{where}; {nearest(name, self)}")
        return self[name]
