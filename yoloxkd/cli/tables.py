"""Text tables and JSON files of the commands."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from yoloxkd.engine.atomic import write_text


def render(table: Table) -> str:
    """A rich table as text."""
    console = Console(file=io.StringIO(), width=110)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined,no-any-return]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], **options: Any) -> str:
    """Rows under a head, the first column to the left, the others to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", **options)
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return render(made)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, making the folder; a path that cannot be written is a UserError."""
    write_text(path, json.dumps(value, indent=2) + "\n")
