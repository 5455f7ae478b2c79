"""Forward pass with every loss: the module that DistributedDataParallel wraps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from yoloxkd.errors import UserError
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, Draw, Losses, LossName


@dataclass(frozen=True, slots=True)
class StudentPass:
    """A batch that the student has seen.

    Attributes:
        model: the student; out: its output; match: who answers for what, as its losses have it
        draw: what is drawn at random in this step follows from
    """

    model: Detector[Any, Any]
    out: Any
    batch: Batch
    match: Any
    draw: Draw


class AuxiliaryLoss(nn.Module, ABC):
    """Losses beside the student's own.

    Attributes:
        names: of everything `forward` gives, every time the same
        counted: whether one of them has a `Loss.count`, or the counts of the student's losses depend on it;
            with `train.accumulate` that costs a further forward pass of it
    """

    names: tuple[LossName, ...]
    counted: bool = False

    def prepare(self, batch: Batch) -> None:
        """Work of its own on the batch, done before the student holds all that it keeps for backward."""

    def assigned_from(self, out: Any) -> Any:
        """What the student's assigner reads: the student's output `out`, or another in its place."""
        return out

    @abstractmethod
    def forward(self, student: StudentPass) -> Losses:
        """The losses of a batch that the student has seen."""


class TrainStep(nn.Module):
    """The student and the trainable parts of every auxiliary loss, so that all gradients are reduced and stepped alike.

    Attributes:
        detector: the student
        aux: every module an `AuxiliaryLoss`
        amp: autocast dtype, or None for full precision; losses are float32 either way
    """

    def __init__(self, detector: Detector[Any, Any], aux: nn.ModuleDict, amp: torch.dtype | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.aux = aux
        self.amp = amp

    def forward(self, batch: Batch, draw: Draw = Draw()) -> Losses:
        """Every loss by name, the student's own first, undivided; the training loss is the sum of the quotients."""
        return self._losses(batch, draw, list(self.auxiliary()))

    def counted(self, batch: Batch, draw: Draw = Draw()) -> Losses:
        """Those among which all are that have a count."""
        return self._losses(batch, draw, [module for module in self.auxiliary() if module.counted])

    def auxiliary(self) -> Iterator[AuxiliaryLoss]:
        for name, module in self.aux.items():
            if not isinstance(module, AuxiliaryLoss):
                raise UserError(
                    f"state.aux['{name}'] is a {type(module).__name__}; give a yoloxkd.engine.step.AuxiliaryLoss"
                )
            yield module

    def _losses(self, batch: Batch, draw: Draw, auxiliary: list[AuxiliaryLoss]) -> Losses:
        with torch.autocast(batch.images.device.type, dtype=self.amp, enabled=self.amp is not None):
            for module in auxiliary:
                module.prepare(batch)
            out = self.detector(batch.images)
            draw = draw._replace(place=batch.place)
            assignment_source = out
            for module in auxiliary:
                assignment_source = module.assigned_from(assignment_source)
            match = self.detector.assign(assignment_source, batch.targets, draw)
            losses = self.detector.losses(out, batch.targets, match)
            student = StudentPass(self.detector, out, batch, match, draw)
            for module in auxiliary:
                losses = losses | module(student)
        return losses
