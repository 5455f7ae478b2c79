"""`best.pt` (the student alone) and `last.pt` (the whole run)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.resume import run_state
from yoloxkd.errors import Interrupted


class Checkpoints(Callback):
    """Writes `last.pt` and `best.pt`.

    last.pt  after every epoch, at an interruption, and before an evaluation: one that fails costs no step, and a resumed
             run begins with it
    best.pt  whenever validation AP improves; as long as there is no AP (-1, NaN), whenever there was an evaluation. A run
             that was never evaluated leaves its last student
    header  what identifies the model: architecture, class names, input size, resolved recipe, package version
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header

    def on_fit_start(self, state: State) -> None:
        """A run that goes on without its best.pt begins to look for the best again."""
        if "best_epoch" in state.extra and not (state.out / "best.pt").is_file():
            epoch = state.extra.pop("best_epoch") + 1
            state.extra.pop("best_metrics", None)
            state.best = -1.0
            state.say(
                f"warning: {state.out / 'best.pt'}, the student of epoch {epoch}, is not there any more; "
                "the best of the students from here on is kept"
            )

    def on_eval_start(self, state: State) -> None:
        speed = {"images_per_second": state.images_per_second}  # of steps that a resumed run does not make again
        self._save_last(state, _plain(state.detector.state_dict()), state.epoch, state.step_in_epoch, speed)

    def on_eval_end(self, state: State) -> None:
        ap = float(state.metrics["AP"])
        if ap > state.best or state.best < 0:
            self._save_best(state, state.metrics)
            state.best = max(state.best, ap)

    def on_epoch_end(self, state: State) -> None:
        self._save_last(state, _plain(state.detector.state_dict()), state.epoch + 1, 0)

    def on_fit_end(self, state: State) -> None:
        if "best_epoch" in state.extra:
            return
        measured = state.extra.get("evaluated") == state.epoch
        self._save_best(state, state.metrics if measured else {})
        if not measured:
            state.say(
                "warning: this run was not evaluated; best.pt is its last student, and metrics.json has no numbers"
            )

    def on_exception(self, state: State, error: BaseException) -> None:
        # an interruption between epochs finds step_in_epoch at 0 and last.pt already written
        if not isinstance(error, Interrupted) or not state.step_in_epoch:
            return
        model = _plain(state.detector.state_dict())
        if all(bool(torch.isfinite(v).all()) for v in model.values()):
            self._save_last(state, model, state.epoch, state.step_in_epoch)
        else:  # the guard looks at the losses every few steps only
            state.say("warning: the weights are no longer finite, so last.pt was left as it was")

    def _save_best(self, state: State, metrics: dict[str, Any]) -> None:
        state.extra["best_epoch"] = state.epoch
        state.extra["best_metrics"] = metrics
        model = state.ema.module if state.ema else state.detector
        value = self.header | {"kind": "student", "model": _plain(model.state_dict())}
        save_checkpoint(value | {"epoch": state.epoch + 1, "metrics": metrics}, state.out / "best.pt")

    def _save_last(
        self, state: State, model: dict[str, Tensor], epoch: int, step: int, more: Mapping[str, Any] | None = None
    ) -> None:
        value = self.header | {"kind": "run", "model": model} | dict(more or {})
        save_checkpoint(value | {"run": run_state(state, epoch=epoch, step_in_epoch=step)}, state.out / "last.pt")


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the default memory format and on the CPU, so that a file does not depend on where it was trained."""
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
