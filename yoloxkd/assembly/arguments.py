"""Checks of numbers given by Python users and the command line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yoloxkd.config.load import shown
from yoloxkd.errors import UserError
from yoloxkd.types import ImageSize


def reference(name: str, value: Any) -> str:
    """A name or a path as text. UserError: another type, nothing, or more than any file can be called."""
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"{name} should be a name or a path, got {value!r}")
    try:
        os.stat(value)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name} {str(value)[:40]!r}... cannot be the name of a file: {error}") from error
    return str(value)


def references(**arguments: Any) -> None:
    """Look at some arguments by `reference`, each None, one or a list. UserError."""
    for name, value in arguments.items():
        for one in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            reference(name, one)


def device_name(device: Any) -> str:
    """A device as the command line names it, from that text, a CUDA index or a torch.device. UserError: anything else."""
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device) or str(device) == "":
        raise UserError(f"device should be a name such as 'cpu' or 'cuda:0', or a CUDA index, got {device!r}")
    return str(device)


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1. UserError: anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= 1:
        raise UserError(f"{name} should be a number from 0 to 1, got {value!r}")
    return float(value)


def whole_number(name: str, value: Any, least: int, most: int) -> int:
    """An integer within limits. UserError: anything else."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise UserError(f"{name} should be an integer from {least} to {most}, got {shown(value)}")
    return int(value)


def whole_size(imgsz: Any) -> ImageSize:
    """An input size: one integer or two, in px. UserError: anything else."""
    sides = list(imgsz) if isinstance(imgsz, list | tuple) else [imgsz]
    if len(sides) not in (1, 2) or not all(isinstance(s, int | np.integer) and not isinstance(s, bool) for s in sides):
        raise UserError(f"imgsz should be an integer in px, or two of them, got {imgsz!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
