"""The guard against losses that are not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import GateError

CHECK_EVERY = 10  # steps between looks at the counter: each look waits for the device


class FiniteGuard(Callback):
    """Counts steps with a loss that is not finite, on the device, and stops the run before such weights are saved.

    tolerated  steps that may be lost where a gradient scaler skips them; without one the first has spoiled the weights
    """

    def __init__(self, tolerated: int) -> None:
        self.tolerated = tolerated
        self.count: Tensor | None = None

    def on_fit_start(self, state: State) -> None:
        self.count = torch.zeros((), device=state.device)

    def on_losses(self, state: State) -> None:
        assert self.count is not None
        total = torch.stack([v.detach().float() for v in state.losses.values()]).sum()
        self.count += ~torch.isfinite(total)

    def on_step(self, state: State) -> None:
        # the last step of an epoch is looked at before its evaluation and its checkpoint
        if state.iteration % CHECK_EVERY == 0 or state.step_in_epoch == state.iters_per_epoch:
            self._check(state)

    def _check(self, state: State) -> None:
        assert self.count is not None
        total = self.count.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)  # every process stops, not only the one that met it
        count = int(total)
        if count > (self.tolerated if state.scaler else 0):
            bad = [k for k, v in state.losses.items() if not bool(torch.isfinite(v))]
            names = f" ({', '.join(bad)})" if bad else ""
            raise GateError(
                f"{count} step(s) up to step {state.iteration} had a loss that is not finite{names}; "
                "lower optim.lr_per_image or set optim.clip_norm, and resume from the last checkpoint"
            )
