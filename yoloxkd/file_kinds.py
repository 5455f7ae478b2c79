"""Recognize a file by its content, whatever it is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from yoloxkd.errors import UserError

_OWN_KEY = b"size_multiple"  # in the metadata of every ONNX file of ours
_GRAPH, _METADATA = 7, 14
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""Field number -> wire type of ONNX' ModelProto."""


def is_onnx(path: str | Path) -> bool:
    """Whether a file is an ONNX model, be it cut short."""
    return _metadata(path) is not None


def is_own_onnx(path: str | Path) -> bool:
    """Whether a file is an ONNX model that this program exported."""
    return any(_OWN_KEY in entry for entry in _metadata(path) or ())


def is_torch(path: str | Path) -> bool:
    """Whether a file begins as PyTorch's checkpoints do: a zip archive, or (of old) a pickle."""
    try:
        with open(path, "rb") as file:
            return file.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))
    except OSError:
        return False


def check_not_exported(path: str | Path) -> None:
    """UserError: an exported file stands where a checkpoint is needed."""
    if is_onnx(path) or (Path(path).suffix.lower() == ".onnx" and os.path.isfile(path) and not is_torch(path)):
        raise UserError(
            f"{path} is an exported ONNX file, and a checkpoint is needed here: give the .pt or .pth it was exported from "
            "(a run's best.pt, or last.pt to resume it)"
        )


def _metadata(path: str | Path) -> list[bytes] | None:
    """The metadata of an ONNX file, an entry a field; None: not an ONNX file. Weights are stepped over, not read."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            return _fields(file, size)
    except (OSError, ValueError):
        return None


def _fields(file: IO[bytes], size: int) -> list[bytes] | None:
    field_numbers: set[int] = set()
    metadata = []
    while file.tell() < size:
        tag = _varint(file)
        number = tag >> 3
        if _MODEL_FIELDS.get(number) != tag & 7:
            return None
        field_numbers.add(number)
        value = _varint(file)
        if _MODEL_FIELDS[number] == 2:
            if number == _METADATA and value < 1 << 20:
                metadata.append(file.read(value))
            else:
                file.seek(value, os.SEEK_CUR)
    return metadata if _GRAPH in field_numbers and 1 in field_numbers else None


def _varint(file: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("cut short")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("not a number")
