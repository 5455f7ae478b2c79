"""Numbers as Python users and the command line give them."""

from __future__ import annotations

from typing import Any

import numpy as np

from yoloxkd.errors import UserError
from yoloxkd.types import ImageSize


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1. UserError: anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= 1:
        raise UserError(f"{name} should be a number from 0 to 1, got {value!r}")
    return float(value)


def whole_size(imgsz: Any) -> ImageSize:
    """An input size: one integer or two, in px. UserError: anything else."""
    sides = list(imgsz) if isinstance(imgsz, list | tuple) else [imgsz]
    if len(sides) not in (1, 2) or not all(isinstance(s, int | np.integer) and not isinstance(s, bool) for s in sides):
        raise UserError(f"imgsz should be an integer in px, or two of them, got {imgsz!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
