"""Training steps as the engine does them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from yoloxkd.config.recipe import OptimSection
from yoloxkd.engine.device import grad_scaler, memory_format
from yoloxkd.engine.optim import sgd
from yoloxkd.engine.step import TrainStep
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, Losses


def total(losses: Losses) -> Tensor:
    """The training loss of a batch that is whole."""
    return torch.stack([loss.mean().float() for loss in losses.values()]).sum()


def training_step(
    student: Detector[Any, Any],
    batch: Batch,
    aux: nn.ModuleDict | None = None,
    lr: float = 1e-5,
    amp: torch.dtype | None = None,
    channels_last: bool | Literal["auto"] = "auto",
) -> Callable[[], Losses]:
    """Forward, losses, backward and the optimizer's step of a student, on the same batch again and again.

    Everything is where the batch is, in the memory format that the engine uses; `amp` is the autocast dtype.
    """
    aux, device = aux or nn.ModuleDict(), batch.images.device
    layout = memory_format(channels_last, student, device)
    student.train().to(device, memory_format=layout)
    batch = replace(batch, images=batch.images.contiguous(memory_format=layout))
    step = TrainStep(student, aux.to(device), amp)
    optimizer = sgd([student, aux], lr, OptimSection(), fused=True if device.type == "cuda" else None)
    scaler = grad_scaler(amp, device)

    def run() -> Losses:
        losses = step(batch)
        optimizer.zero_grad(set_to_none=True)
        if scaler is None:
            total(losses).backward()
            optimizer.step()
        else:
            scaler.scale(total(losses)).backward()
            scaler.step(optimizer)
            scaler.update()
        return losses

    return run
