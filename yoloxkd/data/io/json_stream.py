"""Stream the lists of a large JSON object, a few rows at a time."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from json.scanner import make_scanner
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22  # characters read at a time
_ROWS = 4096
_AFTER = tuple(",]} \t\n\r")  # what ends a number or a word
_space = re.compile(r"[ \t\n\r]*").match
_comma = re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match
_decode, _scan = json.JSONDecoder().raw_decode, make_scanner(json.JSONDecoder())  # type: ignore[arg-type]


@dataclass(slots=True)
class Rows:
    """Some rows of the list `key`, each with the line of the file it starts on (from 1).

    whole  the value is the list it should be; else `values` holds what is there instead
    """

    key: str
    values: list[Any]
    lines: list[int]
    whole: bool = True


class _Text:
    """A JSON file read by blocks; `at` is the place in `text` up to which everything is done with."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as stream:
            encoding = json.detect_encoding(stream.read(4))
        self.stream = file.open(encoding=encoding)
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.block = _BLOCK

    def more(self) -> bool:
        """Forget what is done with and read on; False at the end of the file."""
        if self.ended:
            return False
        read = self.stream.read(self.block)
        self.ended = len(read) < self.block
        self.text, self.at = self.text[self.at :] + read, 0
        return bool(read)

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def look(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = _space(self.text, self.at)
            self.advance(match.end() if match else self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, expected: str) -> None:
        if self.look() not in expected or self.at >= len(self.text):
            raise self.fault(f"expecting {' or '.join(repr(c) for c in expected)}")
        self.advance(self.at + 1)

    def value(self) -> Any:
        """The next value whole. ValueError: there is none."""
        self.look()
        self.block = _BLOCK
        while True:
            try:
                value, end = _decode(self.text, self.at)
            except json.JSONDecodeError as error:
                fault = error
            else:
                done = isinstance(value, dict | list | str) or self.text[end : end + 1] in _AFTER
                if done or not self.more():
                    self.advance(end)
                    return value
                continue  # a number or a word may go on in the next block
            self.block *= 2
            if not self.more():
                raise self.fault(fault.msg, fault.pos)

    def run(self, values: list[Any], lines: list[int]) -> None:
        """Append the values that lie whole, with the comma after them, in this block, up to a portion of rows."""
        text, at, starts = self.text, self.at, []
        for _ in range(_ROWS - len(values)):
            try:
                value, end = _scan(text, at)
            except (StopIteration, ValueError):
                break
            comma = _comma(text, end)
            if comma is None:
                break
            values.append(value)
            starts.append(at)
            at = comma.end()
        if text.find("\n", self.at, at) < 0:
            lines += [self.line] * len(starts)
        else:
            breaks = [match.start() for match in re.finditer("\n", text[self.at : at])]
            lines += [self.line + bisect_left(breaks, start - self.at) for start in starts]
        self.advance(at)

    def fault(self, message: str, at: int | None = None) -> ValueError:
        place = self.at if at is None else at
        line = self.line + self.text.count("\n", self.at, place)
        return ValueError(f"{message[0].lower() + message[1:]}, line {line}")


def json_lists(file: Path, keys: frozenset[str]) -> Iterator[Rows]:
    """The values of `keys` of the object in a JSON file, in the file's order, in portions of rows.

    An empty list is one portion without rows. OSError: the file cannot be read. ValueError: it is not JSON; the message
    names the line. TypeError: it is JSON and not an object.
    """
    text = _Text(file)
    with text.stream:
        if text.look() != "{":
            value = text.value()
            if text.look():
                raise text.fault("extra data")
            raise TypeError(f"a {type(value).__name__}, not an object")
        text.take("{")
        more = text.look() != "}"
        while more:
            if text.look() != '"':
                raise text.fault("expecting a key in double quotes")
            key = text.value()
            text.take(":")
            if key not in keys:
                text.value()
            elif text.look() != "[":
                yield Rows(key, [text.value()], [text.line], whole=False)
            else:
                yield from _list(text, key)
            more = text.look() == ","
            if more:
                text.take(",")
        text.take("}")
        if text.look():
            raise text.fault("extra data")


def _list(text: _Text, key: str) -> Iterator[Rows]:
    text.take("[")
    values: list[Any] = []
    lines: list[int] = []
    more = text.look() != "]"
    while more:
        text.run(values, lines)
        if len(values) < _ROWS:  # the run met the block's end, or the list's
            text.look()
            lines.append(text.line)
            values.append(text.value())
            more = text.look() == ","
            if more:
                text.take(",")
        if len(values) == _ROWS and more:
            yield Rows(key, values, lines)
            values, lines = [], []
    text.take("]")
    yield Rows(key, values, lines)
