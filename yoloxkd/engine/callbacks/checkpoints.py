"""`best.pt` (the student alone) and `last.pt` (the whole run)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoloxkd.config.without_folders import without_folders
from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.resume import run_state
from yoloxkd.errors import Interrupted


class Checkpoints(Callback):
    """Writes `last.pt` and `best.pt`.

    last.pt  after every epoch, at an interruption, and before an evaluation: one that fails costs no step, and a resumed
             run begins with it
    best.pt  whenever `state.best` is another epoch: validation AP has improved; or there is no AP yet (-1, NaN), and there
             was an evaluation. A run that was never evaluated leaves its last student. It is meant for others, so its
             recipe has the names of files without their folders

    Args:
        header: What identifies the model: architecture, class names, input size, resolved recipe, package version.
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header
        self.epoch_of_file: int | None = None  # from 0, of the student in best.pt

    def on_fit_start(self, state: State) -> None:
        """A run that goes on without its best.pt begins to look for the best again."""
        if state.best is None:
            return
        if (state.out / "best.pt").is_file():
            self.epoch_of_file = state.best.epoch
            return
        state.say(
            f"warning: {state.out / 'best.pt'}, the student of epoch {state.best.epoch + 1}, is not there any more; "
            "the best of the students from here on is kept"
        )
        state.best = None

    def on_eval_start(self, state: State) -> None:
        speed = {"images_per_second": state.images_per_second}  # of steps that a resumed run does not make again
        self._save_last(state, _on_cpu(state.detector.state_dict()), state.epoch, state.step_in_epoch, speed)

    def on_eval_end(self, state: State) -> None:
        self._save_best(state)

    def on_epoch_end(self, state: State) -> None:
        self._save_last(state, _on_cpu(state.detector.state_dict()), state.epoch + 1, 0)

    def on_fit_end(self, state: State) -> None:
        self._save_best(state)
        if state.best is not None and not state.best.metrics:
            state.say(
                "warning: this run was not evaluated; best.pt is its last student, and metrics.json has no numbers"
            )

    def on_exception(self, state: State, error: BaseException) -> None:
        # an interruption between epochs finds step_in_epoch at 0 and last.pt already written
        if not isinstance(error, Interrupted) or not state.step_in_epoch:
            return
        model = _on_cpu(state.detector.state_dict())
        if all(bool(torch.isfinite(v).all()) for v in model.values()):
            self._save_last(state, model, state.epoch, state.step_in_epoch)
        else:  # the guard looks at the losses every few steps only
            state.say("warning: the weights are no longer finite, so last.pt was left as it was")

    def _save_best(self, state: State) -> None:
        """Keep the student, where `state.best` is not the one in best.pt."""
        best = state.best
        if best is None or best.epoch == self.epoch_of_file:
            return
        model = state.ema.module if state.ema else state.detector
        value = without_folders(self.header) | {"kind": "student", "model": _on_cpu(model.state_dict())}
        save_checkpoint(value | {"epoch": best.epoch + 1, "metrics": best.metrics}, state.out / "best.pt")
        self.epoch_of_file = best.epoch

    def _save_last(
        self, state: State, model: dict[str, Tensor], epoch: int, step: int, more: Mapping[str, Any] | None = None
    ) -> None:
        value = self.header | {"kind": "run", "model": model} | dict(more or {})
        save_checkpoint(value | {"run": run_state(state, epoch=epoch, step_in_epoch=step)}, state.out / "last.pt")


def _on_cpu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the default memory format and on the CPU, so that a file does not depend on where it was trained."""
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
