"""Keyword arguments of the public API: one that is misspelt is answered with the nearest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from yoloxkd.errors import UserError, nearest

P = ParamSpec("P")
R = TypeVar("R")


def known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The method, which refuses a keyword that it does not have by a `UserError` with the nearest one, not by a TypeError."""
    names = [*inspect.signature(function).parameters][1:]
    what = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise UserError(f"{what} takes no '{name}'; {nearest(name, names)}")
        return function(*args, **kwargs)

    return checked
