"""Recognize a file by its content, whatever it is called."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO

from yoloxkd.errors import UserError

_OWN_KEY = b"size_multiple"  # in the metadata of every ONNX file of ours
_GRAPH, _METADATA = 7, 14
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
"""Field number -> wire type of ONNX' ModelProto."""
EXPORTED = {"onnx": ".onnx", "ncnn": ".param", "tflite": ".tflite", "executorch": ".pte"}
"""Format of exported files -> how their names end."""
ARCHIVED_NOTE = "yoloxkd.json"
"""The file with the metadata in the archive at the end of a TFLite or ExecuTorch file of ours."""


def parts_of(path: str | Path) -> list[Path]:
    """All files of an exported model, that of its name first: an ncnn model is three."""
    path = Path(path)
    if path.suffix.lower() != EXPORTED["ncnn"]:
        return [path]
    return [path, path.with_suffix(".bin"), path.with_suffix(".metadata.json")]


def parity_note(path: str | Path) -> Path:
    """The report beside an exported file: `x.parity.json` of `x.onnx`, and with the whole name of other formats'."""
    path = Path(path)
    onnx = path.suffix.lower() == EXPORTED["onnx"]
    return path.with_suffix(".parity.json") if onnx else path.with_name(f"{path.name}.parity.json")


def exported_format(path: str | Path) -> str | None:
    """The format of an exported file by its content, else by its name; None: another file."""
    suffix = Path(path).suffix.lower()
    by_content = (kind for kind in EXPORTED if is_content_of(path, kind))
    return next(by_content, next((kind for kind, ending in EXPORTED.items() if suffix == ending), None))


def is_content_of(path: str | Path, kind: str) -> bool:
    """Whether a file begins as those of an exported format do."""
    if kind == "onnx":
        return is_onnx(path)
    start = head(path, 12)
    if kind == "ncnn":
        return start.startswith(b"7767517\n")
    return start[4:8] == b"TFL3" if kind == "tflite" else start[4:6] == b"ET" and start[8:10] == b"eh"


def is_own_export(path: str | Path) -> bool:
    """Whether a file is a model that this program exported."""
    kind = exported_format(path)
    if kind == "ncnn":
        return _OWN_KEY in head(parts_of(path)[-1], 1 << 20)
    if kind in ("tflite", "executorch"):
        try:
            with zipfile.ZipFile(path) as archive:
                return ARCHIVED_NOTE in archive.namelist()
        except (OSError, zipfile.BadZipFile):
            return False
    return is_own_onnx(path)


def head(path: str | Path, count: int = 8) -> bytes:
    """The first bytes of a file; nothing where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError:
        return b""


def is_onnx(path: str | Path) -> bool:
    """Whether a file is an ONNX model, be it cut short."""
    return _metadata(path) is not None


def is_own_onnx(path: str | Path) -> bool:
    """Whether a file is an ONNX model that this program exported."""
    return any(_OWN_KEY in entry for entry in _metadata(path) or ())


def is_torch(path: str | Path) -> bool:
    """Whether a file begins as PyTorch's checkpoints do: a zip archive, or (of old) a pickle."""
    return head(path).startswith((b"PK\x03\x04", b"\x80\x02"))


def check_not_exported(path: str | Path) -> None:
    """UserError: an exported file stands where a checkpoint is needed."""
    kind = exported_format(path)
    if kind is not None and os.path.isfile(path) and not is_torch(path):
        raise UserError(
            f"{path} is an exported {'ONNX' if kind == 'onnx' else kind} file, and a checkpoint is needed here: give the .pt or .pth it was exported from "
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
