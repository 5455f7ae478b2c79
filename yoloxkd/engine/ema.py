"""Exponential moving average of the weights, as in the YOLOX release."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class ModelEMA:
    """An exponential moving average of a model's floating-point state, ready for evaluation as `module`.

    The decay at update u (the first is 1) is `decay * (1 - exp(-u / ramp))`: early averages follow the model closely.
    Parameters and floating-point buffers (batch-norm statistics) are averaged; integer counters keep the values they
    had at the start. `module` is in eval mode and has no gradients.
    """

    def __init__(self, model: nn.Module, *, decay: float, ramp: float, updates: int = 0) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp
        self.updates = updates

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Blend in the model's present weights. `model` must have the same state-dict keys as at construction."""
        self.updates += 1
        keep = self.decay * (1 - math.exp(-self.updates / self.ramp))
        averaged, live = self.module.state_dict(), model.state_dict()
        names = [name for name, value in averaged.items() if value.is_floating_point()]
        averages: list[Tensor] = [averaged[name] for name in names]
        torch._foreach_mul_(averages, keep)
        torch._foreach_add_(averages, [live[name] for name in names], alpha=1 - keep)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights as `module`, and the number of `updates` made."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])
