"""`kd_gradients.csv`: how large the gradient of each distillation loss is beside the task's, and which way it points."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from yoloxkd.config.strict import Strict
from yoloxkd.distributed.comm import rank
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.callbacks.csv_log import read_numbers
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.events import State
from yoloxkd.engine.gradients import TASK_LOSS, loss_gradients, trunk
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.types import TASK

FILE = "kd_gradients.csv"


class KDGradientsConfig(Strict):
    """How often to measure; each time costs a backward pass a loss."""

    every: int = Field(100, ge=1, description="steps between measurements; the first is at step 1")


class KDGradients(NamedCallback):
    """Measures the gradient of every loss that is not the task's on backbone and neck, every so many steps.

    Columns: step and epoch (from 1), `norm`, that of the task's gradient, and for each loss `share/NAME`, the norm of its
    gradient over that, and `cosine/NAME`, of the angle between the two. `METHOD/all` is the sum of a method, `METHOD/all/s8`
    of its terms at stride 8. With `train.accumulate` the first part of a step's batch is measured, and in a distributed run
    the images of rank zero. The run's result does not change by it.
    """

    name = "kd_gradients"
    everywhere = True  # a backward pass through synchronized norms needs every process
    Config = KDGradientsConfig
    cfg: KDGradientsConfig

    def __init__(self, config: Strict | None = None, **keys: Any) -> None:
        super().__init__(config, **keys)
        self.rows: list[dict[str, str]] = []

    def on_fit_start(self, state: State) -> None:
        if state.recipe.engine.compile:
            raise UserError(
                "callbacks.kd_gradients runs several backward passes on one step, for which a compiled model does not keep "
                "its values; use --set engine.compile=false, or leave the callback out"
            )
        file = state.out / FILE
        if state.iteration and file.is_file():
            rows = read_numbers(file, whole=("step", "epoch"), needed=("norm",))
            self.rows = [row for row in rows if int(row["step"]) <= state.iteration]

    def on_losses(self, state: State) -> None:
        if state.part or state.iteration % self.cfg.every or all(name.source == TASK for name in state.losses):
            return
        scale = float(state.scaler.get_scale()) if state.scaler else 1.0
        measured = loss_gradients(state.losses, trunk(state.detector), scale)
        task = measured.pop(TASK_LOSS)
        row = {"step": str(state.iteration + 1), "epoch": str(state.epoch + 1), "norm": f"{task.norm:.6g}"}
        for name, one in measured.items():
            row |= {f"share/{name}": f"{one.share:.6g}", f"cosine/{name}": f"{one.cosine:.6g}"}
        self.rows.append(row)

    def on_eval_start(self, state: State) -> None:
        self._write(state)  # a run resumed at the evaluation does not see the steps again

    def on_epoch_end(self, state: State) -> None:
        self._write(state)

    def on_exception(self, state: State, error: BaseException) -> None:
        if isinstance(error, Interrupted):
            self._write(state)

    def _write(self, state: State) -> None:
        if rank() or not self.rows:
            return
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        lines = [columns, *([row.get(column, "") for column in columns] for row in self.rows)]
        write_text(state.out / FILE, "\n".join(map(",".join, lines)) + "\n")
