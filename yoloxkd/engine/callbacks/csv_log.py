"""`results.csv`: a row an epoch with every loss term, learning rate, speed and metrics."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from typing import Any

from yoloxkd.config.load import shown
from yoloxkd.config.renamed import current_column
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import UserError
from yoloxkd.metrics.measure import overall

_REMEDY = "put the file back as it was, or move it away to begin a new one"


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a results.csv, as text: a whole number as `epoch`, and numbers or nothing. UserError: it is none."""
    rows = read_numbers(path, whole=("epoch",))
    return [{current_column(name): value for name, value in row.items()} for row in rows]


def read_table(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV file. OSError: it cannot be opened; UserError: it is no CSV."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            return [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file: {error}; {_REMEDY}") from error


def read_numbers(
    path: str | os.PathLike[str], whole: Sequence[str], needed: Sequence[str] = ()
) -> list[dict[str, str]]:
    """The rows of a table of numbers, as text. OSError: it cannot be opened; UserError: it was changed to something else.

    whole   columns that hold a whole number from 1 in every row
    needed  columns that hold a number in every row; the others may be empty
    """
    rows = read_table(path)
    for line, row in rows:
        place = f"{path} was changed or is damaged: line {line}"
        if None in row:
            raise UserError(f"{place} has more values than there are columns; {_REMEDY}")
        for column in {*whole, *needed, *row}:
            value = row.get(column, "")
            if not (_is_whole(value) if column in whole else _is_number(value) or (not value and column not in needed)):
                kind = "a whole number from 1" if column in whole else "a number"
                raise UserError(f"{place} has {shown(value)} as '{column}', which should be {kind}; {_REMEDY}")
    return [row for _, row in rows]


def _is_whole(text: str) -> bool:
    return text.isdecimal() and len(text) < 16 and int(text) > 0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class CsvLog(Callback):
    """Keeps the whole table and rewrites the file each epoch, so that it is never half a row and resumes cleanly."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_fit_start(self, state: State) -> None:
        path = state.out / "results.csv"
        if state.epoch and path.is_file():
            self.rows = [row for row in read_rows(path) if int(row["epoch"]) <= state.epoch]

    def on_epoch_end(self, state: State) -> None:
        evaluated = state.evaluated == state.epoch
        row: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "lr": f"{state.lr:.8g}",
            "images_per_s": f"{state.images_per_second:.2f}",
            "loss": f"{sum(state.epoch_losses.values()):.6g}",
        }
        row |= {f"loss/{name}": f"{value:.6g}" for name, value in state.epoch_losses.items()}
        row |= {name: f"{value:.6f}" if evaluated else "" for name, value in overall(state.metrics).items()}
        self.rows.append(row)
        columns = list(dict.fromkeys(key for r in self.rows for key in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(state.out / "results.csv", text.getvalue())
