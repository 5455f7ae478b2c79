"""Loss weight of a method at each step: warm-up, decay, end, or a measured share of the task loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from yoloxkd.distributed.ranks import all_mean
from yoloxkd.kd.base import KDConfig


class MethodWeight:
    """The factor on one method's terms.

    With a number as weight: weight * warm-up * decay, 0 from `stop_epoch` on. With "auto": for the first `auto_iterations`
    steps the ratio of the mean task loss to the method's mean loss so far, times `auto_share` (the first step only
    measures), all of it on the device; then that number, for good. Warm-up and decay apply to either.

    With auto "gradient" the two are norms of gradients, every `auto_every` steps. What is measured before step `start`
    serves until then; after it the measurement begins anew, and becomes the number after `auto_iterations` steps.

    epochs  of the run
    start   first step after the learning rate's warm-up
    """

    def __init__(self, cfg: KDConfig, iters_per_epoch: int, epochs: int, start: int = 0) -> None:
        self.cfg, self.iters_per_epoch = cfg, iters_per_epoch
        end = epochs if cfg.stop_epoch is None else min(epochs, cfg.stop_epoch)
        self.decay_steps = round((end if cfg.decay_epochs is None else cfg.decay_epochs) * iters_per_epoch)
        self.fixed: float | None = None if cfg.weight == "auto" else float(cfg.weight)
        self.iterations = 0
        self.every = cfg.auto_every if cfg.auto == "gradient" else 1
        self.before = math.ceil(start / self.every) if cfg.auto == "gradient" else 0  # measurements during the warm-up
        self.needed = self.before + math.ceil(cfg.auto_iterations / self.every)
        self._task: Tensor | None = None
        self._loss: Tensor | None = None
        self._step: Tensor | None = None  # task and method, (2,) or (2, N), of the parts of this step so far

    def state_dict(self) -> dict[str, Any]:
        """What the automatic weight has measured so far, or has become: plain numbers, and sums on the device."""
        return {"fixed": self.fixed, "seen": self.iterations, "task": self._task, "own": self._loss}

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Go on measuring where another run stopped, or keep what it fixed."""
        self.fixed, self.iterations = saved["fixed"], saved["seen"]
        self._task, self._loss = (None if v is None else v.to(device) for v in (saved["task"], saved["own"]))

    @property
    def measuring(self) -> bool:
        return self.fixed is None

    def measures_gradients(self, iteration: int) -> bool:
        """Whether it takes in gradients at a step of the run, from 0."""
        return self.measuring and self.cfg.auto == "gradient" and iteration % self.every == 0

    def at(self, epoch: int, iteration: int, device: torch.device) -> float | Tensor:
        """The factor of a step; epoch and iteration count from 0, iterations over the whole run."""
        cfg = self.cfg
        if cfg.stop_epoch is not None and epoch >= cfg.stop_epoch:
            return 0.0
        steps = cfg.warmup * self.iters_per_epoch
        ramp = min(1.0, (iteration + 1) / steps) if steps > 0 else 1.0
        ramp *= self.decayed(iteration)
        if self.fixed is not None:
            return self.fixed * ramp
        if self._task is None or self._loss is None:
            return torch.zeros((), device=device)
        ratio = cfg.auto_share * self._task / self._loss
        return torch.where(self._loss > 0, ratio, 0.0) * ramp

    def observe_part(self, task: Tensor, loss: Tensor, part: int, parts: int) -> bool:
        """As `observe`, of one part of a step's batch after the other; their losses add up to the step's."""
        losses = torch.stack([task, loss])
        self._step = losses if part == 0 or self._step is None else self._step + losses
        return part + 1 == parts and self.observe(*self._step.unbind())

    def observe_gradients(self, gradients: Tensor, part: int, parts: int) -> bool:
        """Likewise of gradients (2, N), the task's and the method's: their sums over parts and means over processes count."""
        self._step = gradients if part == 0 or self._step is None else self._step + gradients
        if part + 1 < parts:
            return False
        norms, self._step = all_mean(self._step).norm(dim=1), None
        return self.observe(*norms.unbind())

    def decayed(self, iteration: int) -> float:
        """What the decay leaves of the factor: 1 at the first step of the run, the floor at the last one of the decay."""
        if self.cfg.decay == "none":
            return 1.0
        done = min(1.0, iteration / max(1, self.decay_steps - 1))
        factor = 1 - done if self.cfg.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.cfg.decay_floor + (1 - self.cfg.decay_floor) * factor

    def observe(self, task: Tensor, loss: Tensor) -> bool:
        """Take in a step's task loss and the method's before the factor, or their gradients' norms; True when this fixed it.

        Both are averaged over processes, so that each has the same factor.
        """
        if self.fixed is not None:
            return False
        usable = task.isfinite() & loss.isfinite()
        task, loss = all_mean(torch.stack([task, loss]).where(usable, 0.0)).unbind()
        if self._task is None or self._loss is None or self.iterations == self.before:
            self._task, self._loss = task, loss
        else:
            self._task, self._loss = self._task + task, self._loss + loss
        self.iterations += 1
        if self.iterations < self.needed:
            return False
        task_sum, loss_sum = torch.stack([self._task, self._loss]).double().tolist()
        self.fixed = self.cfg.auto_share * task_sum / loss_sum if loss_sum > 0 else 1.0
        return True
