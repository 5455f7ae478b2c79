"""Guard against non-finite losses and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import GateError

CHECK_EVERY = 10  # steps between looks at the counters: each look waits for the device
LEAST_SCALE = 1.0
"""float16 gradients that overflow at this loss scale overflow without one, too."""


class FiniteGuard(Callback):
    """Counts steps with a loss that is not finite, on the device, and stops the run before such weights are saved.

    With a gradient scaler (fp16) it also counts the steps that were skipped because gradients overflowed, says how many
    an epoch had, and stops the run when the loss scale has fallen below `LEAST_SCALE`: nothing is trained any more then.
    The losses of a step are those of all processes, so that each comes to the same verdict.

    tolerated  steps with such a loss that may be lost where a gradient scaler skips them; without one the first has
               spoiled the weights
    """

    everywhere = True

    def __init__(self, tolerated: int) -> None:
        self.tolerated = tolerated
        self.count: Tensor | None = None
        self.skipped: Tensor | None = None
        self.scale: Tensor | None = None

    def on_fit_start(self, state: State) -> None:
        self.count = torch.zeros((), device=state.device)
        self.skipped = torch.zeros((), device=state.device)

    def on_step(self, state: State) -> None:
        assert self.count is not None
        self.count += ~torch.isfinite(torch.stack(list(state.losses.values())).sum())
        self._watch_scale(state)
        # the last step of an epoch is looked at before its evaluation and its checkpoint
        if state.iteration % CHECK_EVERY == 0 or state.step_in_epoch == state.iters_per_epoch:
            self._check(state)

    def on_epoch_end(self, state: State) -> None:
        if self.scale is None or self.skipped is None:
            return
        if skipped := int(self.skipped):
            state.say(
                f"fp16: gradients overflowed in {skipped} step(s) of epoch {state.epoch + 1}, which were skipped; "
                f"the loss scale is {float(self.scale):g}"
            )
            self.skipped.zero_()

    def _watch_scale(self, state: State) -> None:
        """A scale that has fallen is a step that the scaler has skipped."""
        scale = None if state.scaler is None else state.scaler._scale  # a tensor; get_scale() would wait for the device
        if scale is None:
            return
        assert self.skipped is not None
        before = state.scaler._init_scale if self.scale is None else self.scale
        self.skipped += scale < before
        self.scale = scale.clone()

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
        if self.scale is not None and float(self.scale) < LEAST_SCALE:
            raise GateError(
                f"fp16 gradients overflow at every loss scale (it has fallen to {float(self.scale):g} at step "
                f"{state.iteration}), so nothing is trained; use --amp bf16 or off, or lower optim.lr_per_image, and "
                "resume from the last checkpoint"
            )
