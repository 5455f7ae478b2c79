"""Parse single values of annotation files: numbers, flags, ids, names."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from yoloxkd.data.problems import shown

NO_ID = int(np.iinfo(np.int64).min)
_PLAIN_ID = 1 << 62  # ids below this stand for themselves
_MOST_PX = 2**31 - 1
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,99})", re.ASCII)
_FLAGS: dict[Any, bool] = {None: False, 0: False, 1: True}  # False and True are equal to 0 and 1
_FLAGS |= dict.fromkeys(("", "0", "0.0", "false", "no", "n", "f"), False)
_FLAGS |= dict.fromkeys(("1", "1.0", "true", "yes", "y", "t"), True)


def flag(value: object) -> bool | None:
    """A yes or no as number, word or truth value; nothing at all is no. None: it is neither."""
    try:
        return _FLAGS.get(value.strip().lower() if isinstance(value, str) else value)
    except TypeError:  # a list or an object
        return None


def flags(values: Iterable[object]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bool, and (n,) bool where a value is neither yes nor no (taken as no)."""
    parsed_flags = [flag(value) for value in values]
    return np.array([one is True for one in parsed_flags], bool), np.array([one is None for one in parsed_flags], bool)


def number(value: object) -> float:
    """NaN where the value is no number, or text that holds none."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if _NUMBER.fullmatch(text) else math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return math.nan


def numbers(values: Sequence[Any], shape: tuple[int, ...] = ()) -> np.ndarray:
    """float64 (n, *shape) for shape () or (k,); NaN where a value is missing, no number, or of another shape."""
    try:
        types = set(map(type, chain.from_iterable(values) if shape else values))
        if types <= {int, float}:
            array = np.array(values, np.float64)
            if array.shape == (len(values), *shape):
                return array
    except (TypeError, ValueError, OverflowError):
        pass
    out = np.full((len(values), *shape), np.nan)
    for row, value in enumerate(values):
        if not shape:
            out[row] = number(value)
        elif isinstance(value, list | tuple) and len(value) == shape[0]:
            out[row] = [number(one) for one in value]
    return out


def size_px(value: object) -> int | None:
    """A height or width: a positive whole number, also as text or with a decimal point. None: it is not."""
    pixels = number(value)
    return int(pixels) if 1 <= pixels <= _MOST_PX and pixels == int(pixels) else None


def id_key(value: object) -> int | str | None:
    """What an id is compared by: a whole number, also as text ("7") or with a decimal point (7.0), else its text as given.

    None: it can be no id.
    """
    if type(value) is int:
        return value
    if isinstance(value, str):
        text = value.strip()
        return (int(text) if _WHOLE.fullmatch(text) else value) if text else None
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return None


class IdCodes:
    """Ids as int64: a whole number below 2^62 stands for itself, every other id gets a code of its own."""

    def __init__(self) -> None:
        self._odd: dict[int | str, int] = {}

    def of(self, values: Sequence[Any]) -> np.ndarray:
        """(n,) int64; NO_ID where a value can be no id."""
        if set(map(type, values)) <= {int}:
            try:
                array = np.array(values, np.int64)
                if np.abs(array).max(initial=0) < _PLAIN_ID and array.min(initial=0) > NO_ID:
                    return array
            except OverflowError:
                pass
        return np.array([self.code(value) for value in values], np.int64)

    def code(self, value: object) -> int:
        key = id_key(value)
        if key is None:
            return NO_ID
        if isinstance(key, int) and abs(key) < _PLAIN_ID:
            return key
        return self._odd.setdefault(key, NO_ID + 1 + len(self._odd))


def is_plain(codes: np.ndarray) -> np.ndarray:
    """Which codes are the ids themselves."""
    return codes > -_PLAIN_ID


def written_id(value: Any) -> int | str:
    """An id as its file has it, for what is written about it; 7.0 is 7."""
    return int(value) if isinstance(value, float) else value


class ClassNames:
    """The class names of a data set, to be found as written, else but for spaces around and the Unicode form."""

    def __init__(self, names: Sequence[str]) -> None:
        self.exact = {name: label for label, name in enumerate(names)}
        self._bare = {bare_name(name): label for label, name in enumerate(names)}

    def label(self, name: str) -> int | None:
        label = self.exact.get(name)
        return self._bare.get(bare_name(name)) if label is None else label


def bare_name(name: str) -> str:
    """A class name as it is compared: in Unicode's composed form, without spaces around."""
    return unicodedata.normalize("NFC", name).strip()


def has_control(text: str) -> bool:
    """Whether a text holds what no name of a file or class does: control characters, line ends, halves of characters.

    Bytes of a file name that are not UTF-8 (Python has them as U+DC80 to U+DCFF) are none of these.
    """
    return any(unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") and not "\udc80" <= c <= "\udcff" for c in text)


def typed(value: object) -> str:
    """A value for a sentence: as it was written, shortened."""
    return "nothing" if value is None else shown(repr(value))
