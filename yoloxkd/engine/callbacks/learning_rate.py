"""`learning_rate.csv`: the rate of single steps, where `results.csv` has one an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from yoloxkd.config.strict import Strict
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.callbacks.csv_log import read_numbers
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.events import State
from yoloxkd.errors import Interrupted

ROWS = 2000  # about as many as a run's file has when `every` is left out


class LearningRateConfig(Strict):
    """How often to write the learning rate down."""

    every: int | None = Field(None, ge=1, description=f"steps between rows; None: about {ROWS} rows a run")


class LearningRateLog(NamedCallback):
    """Rows of step (from 1), epoch (from 1) and learning rate; exact after a resume."""

    name = "learning_rate"
    Config = LearningRateConfig
    default = True
    cfg: LearningRateConfig

    def on_fit_start(self, state: State) -> None:
        self.every = self.cfg.every or max(1, state.epochs * state.iters_per_epoch // ROWS)
        self.rows: list[tuple[str, str, str]] = []
        file = state.out / "learning_rate.csv"
        if state.iteration and file.is_file():
            self.rows = [row for row in read_learning_rates(file) if int(row[0]) <= state.iteration]

    def on_step(self, state: State) -> None:
        if (state.iteration - 1) % self.every == 0:
            self.rows.append((str(state.iteration), str(state.epoch + 1), f"{state.lr:.8g}"))

    def on_eval_start(self, state: State) -> None:
        _write(
            state.out / "learning_rate.csv", self.rows
        )  # a run resumed at the evaluation does not see the steps again

    def on_epoch_end(self, state: State) -> None:
        _write(state.out / "learning_rate.csv", self.rows)

    def on_exception(self, state: State, error: BaseException) -> None:
        if isinstance(error, Interrupted):
            _write(state.out / "learning_rate.csv", self.rows)


def read_learning_rates(file: Path) -> list[tuple[str, str, str]]:
    """(step, epoch, rate) of every row, as text. UserError: they are none."""
    rows = read_numbers(file, whole=("step", "epoch"), needed=("lr",))
    return [(row["step"], row["epoch"], row["lr"]) for row in rows]


def _write(file: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    write_text(file, "\n".join(["step,epoch,lr", *map(",".join, rows)]) + "\n")
