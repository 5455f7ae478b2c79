"""Text tables and JSON files of the commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from yoloxkd.engine.atomic import write_text

_GAP = "  "
_FIRST = 48  # columns of the screen; a longer first cell has a line of its own


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Rows under a head, the first column and those of `left` to the left, the others to the right.

    No cell is cut, however narrow the screen, and no character of it means anything but itself. After a first cell that
    is very long the row goes on in the next line.
    """
    lines = [list(columns), *([printable(cell) for cell in row] for row in rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]
    widths[0] = max(cell_len(line[0]) for line in lines if cell_len(line[0]) <= _FIRST)
    out = []
    for line in lines:
        if cell_len(line[0]) > _FIRST and len(line) > 1:
            out.append(line[0])
            line[0] = ""
        cells = (
            _padded(cell, width, i == 0 or columns[i] in left)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        out.append(_GAP.join(cells).rstrip())
    return "\n".join(out)


def _padded(cell: str, width: int, left: bool) -> str:
    space = " " * (width - cell_len(cell))
    return cell + space if left else space + cell


def printable(text: str) -> str:
    """A name as one line: line breaks and other control characters are shown as Python writes them."""
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else ascii(c)[1:-1] for c in text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder; a path that cannot be written is a UserError."""
    write_text(path, json.dumps(value, indent=2) + "\n")
