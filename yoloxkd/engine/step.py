"""One forward pass with every loss: the module that DistributedDataParallel wraps."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from yoloxkd.nn.detector import DenseDetector
from yoloxkd.types import Batch


@runtime_checkable
class LooksFirst(Protocol):
    """An auxiliary loss with work of its own on the batch: done before the student holds all that it keeps for backward."""

    def look(self, batch: Batch) -> None: ...


class TrainStep(nn.Module):
    """The student and the trainable parts of every auxiliary loss, so that all gradients are reduced and stepped alike.

    detector   the student
    aux        modules called as module(output, batch) -> {name: scalar}
    amp        autocast dtype, or None for full precision; losses are float32 either way
    """

    def __init__(self, detector: DenseDetector, aux: nn.ModuleDict, amp: torch.dtype | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.aux = aux
        self.amp = amp

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Every loss term by name, task losses first; the training loss is their sum."""
        with self._autocast(batch):
            for module in self.aux.values():
                if isinstance(module, LooksFirst):
                    module.look(batch)
            out = self.detector(batch.images)
            losses = self.detector.losses(out, batch.targets)
            for module in self.aux.values():
                losses = losses | module(out, batch)
        return losses

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The student's own terms alone."""
        with self._autocast(batch):
            return self.detector.losses(self.detector(batch.images), batch.targets)

    def _autocast(self, batch: Batch) -> torch.autocast:
        return torch.autocast(batch.images.device.type, dtype=self.amp, enabled=self.amp is not None)
