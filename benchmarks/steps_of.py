"""Training steps as the engine does them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.engine.optim import sgd
from yoloxkd.engine.step import TrainStep
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, Losses


def total(losses: Losses) -> Tensor:
    """The training loss of a batch that is whole."""
    return torch.stack([loss.mean().float() for loss in losses.values()]).sum()


def training_step(
    student: Detector[Any, Any], batch: Batch, aux: nn.ModuleDict | None = None, lr: float = 1e-5
) -> Callable[[], Losses]:
    """Forward, losses, backward and the optimizer's step of a student in channels_last, on the same batch again and again."""
    aux = aux or nn.ModuleDict()
    student.train().to(memory_format=torch.channels_last)
    step = TrainStep(student, aux)
    optimizer = sgd([student, aux], lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def run() -> Losses:
        losses = step(batch)
        optimizer.zero_grad(set_to_none=True)
        total(losses).backward()
        optimizer.step()
        return losses

    return run
