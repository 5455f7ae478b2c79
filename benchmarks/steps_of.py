"""Training steps as the engine does them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from yoloxkd.engine.optim import sgd
from yoloxkd.engine.step import TrainStep
from yoloxkd.nn.detector import DenseDetector
from yoloxkd.types import Batch


def training_step(
    student: DenseDetector, batch: Batch, aux: nn.ModuleDict | None = None, lr: float = 1e-5
) -> Callable[[], dict[str, Tensor]]:
    """Forward, losses, backward and the optimizer's step of a student in channels_last, on the same batch again and again."""
    aux = aux or nn.ModuleDict()
    student.train().to(memory_format=torch.channels_last)
    step = TrainStep(student, aux)
    optimizer = sgd([student, aux], lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def run() -> dict[str, Tensor]:
        losses = step(batch)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([v.float() for v in losses.values()]).sum().backward()
        optimizer.step()
        return losses

    return run
