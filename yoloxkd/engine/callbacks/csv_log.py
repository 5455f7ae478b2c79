"""`results.csv`: a row an epoch with every loss term, learning rate, speed and metrics."""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.events import Callback, State
from yoloxkd.metrics.measure import overall


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """The rows of a results.csv, as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class CsvLog(Callback):
    """Keeps the whole table and rewrites the file each epoch, so that it is never half a row and resumes cleanly."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_fit_start(self, state: State) -> None:
        path = state.out / "results.csv"
        if state.epoch and path.is_file():
            self.rows = [row for row in read_rows(path) if int(row["epoch"]) <= state.epoch]

    def on_epoch_end(self, state: State) -> None:
        evaluated = state.extra.get("evaluated") == state.epoch
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

    def on_eval_end(self, state: State) -> None:
        state.extra["evaluated"] = state.epoch
