"""`best.pt` (the student alone) and `last.pt` (the whole run)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from yoloxkd.engine.checkpoint import save_checkpoint
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.resume import run_state
from yoloxkd.errors import Interrupted


class Checkpoints(Callback):
    """Writes `last.pt` after every epoch and at an interruption, `best.pt` whenever validation AP improves.

    header  what identifies the model: architecture, class names, input size, resolved recipe, package version
    """

    def __init__(self, header: dict[str, Any]) -> None:
        self.header = header

    def on_eval_end(self, state: State) -> None:
        ap = float(state.metrics["AP"])
        if ap > state.best:
            state.best = ap
            state.extra["best_epoch"] = state.epoch
            state.extra["best_metrics"] = state.metrics
            model = state.ema.module if state.ema else state.detector
            value = self.header | {"kind": "student", "model": _plain(model.state_dict())}
            value |= {"epoch": state.epoch + 1, "metrics": state.metrics}
            save_checkpoint(value, state.out / "best.pt")

    def on_epoch_end(self, state: State) -> None:
        self._save_last(state, _plain(state.detector.state_dict()), state.epoch + 1, 0)

    def on_exception(self, state: State, error: BaseException) -> None:
        # an interruption between epochs finds step_in_epoch at 0 and last.pt already written
        if not isinstance(error, Interrupted) or not state.step_in_epoch:
            return
        model = _plain(state.detector.state_dict())
        if all(bool(torch.isfinite(v).all()) for v in model.values()):
            self._save_last(state, model, state.epoch, state.step_in_epoch)
        else:  # the guard looks at the losses every few steps only
            state.say("warning: the weights are no longer finite, so last.pt was left as it was")

    def _save_last(self, state: State, model: dict[str, Tensor], epoch: int, step: int) -> None:
        value = self.header | {"kind": "run", "model": model}
        save_checkpoint(value | {"run": run_state(state, epoch=epoch, step_in_epoch=step)}, state.out / "last.pt")


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the default memory format and on the CPU, so that a file does not depend on where it was trained."""
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}
