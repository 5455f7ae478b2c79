"""The guard against losses that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import GateError

CHECK_EVERY = 10  # steps between looks at the counter: each look waits for the device


class FiniteGuard(Callback):
    """Counts steps with a loss that is not finite, on the device, and stops the run before such weights are saved.

    The losses of a step are those of all processes, so that each comes to the same verdict.

    tolerated  steps that may be lost where a gradient scaler skips them; without one the first has spoiled the weights
    """

    everywhere = True

    def __init__(self, tolerated: int) -> None:
        self.tolerated = tolerated
        self.count: Tensor | None = None

    def on_fit_start(self, state: State) -> None:
        self.count = torch.zeros((), device=state.device)

    def on_step(self, state: State) -> None:
        assert self.count is not None
        self.count += ~torch.isfinite(torch.stack(list(state.losses.values())).sum())
        # the last step of an epoch is looked at before its evaluation and its checkpoint
        if state.iteration % CHECK_EVERY == 0 or state.step_in_epoch == state.iters_per_epoch:
            self._check(state)

    def _check(self, state: State) -> None:
        assert self.count is not None
        count = int(self.count)
        if count > (self.tolerated if state.scaler else 0):
            bad = [str(k) for k, v in state.losses.items() if not bool(torch.isfinite(v))]
            names = f" ({', '.join(bad)})" if bad else ""
            raise GateError(
                f"{count} step(s) up to step {state.iteration} had a loss that is not finite{names}; "
                "lower optim.lr_per_image or set optim.clip_norm, and resume from the last checkpoint"
            )
