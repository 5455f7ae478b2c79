"""Pearson correlation distillation (PKD, Cao et al., NeurIPS 2022): the neck's channels, each normalized over the batch.

Nothing depends on how strong a channel is, so that detectors of different families can teach each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.correlation import channel_moments, correlation_loss
from yoloxkd.kd.neck import Branch, BranchDistiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses


class PKDConfig(KDConfig):
    """Keys of `kd` for PKD."""

    alpha: float = published("pkd", "alpha", ge=0, description="weight of the difference, on every level")
    branches: list[Branch] = published("pkd", "branches", min_length=1, description="maps that are distilled")


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda moments: correlation_loss(moments).to(dtype)


class PKD(BranchDistiller):
    """PKD on every paired level of the chosen maps.

    A channel's mean and deviation are those of the whole batch of the step, over its parts and processes; cells of padding
    and ignore regions are not in them.
    """

    Config = PKDConfig
    name: ClassVar[str] = "pkd"
    counted = True

    def __init__(self, cfg: PKDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.branches, cfg.alpha)
        self.cfg = cfg

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        out: Losses = {}
        for term, student, teacher, excluded in self.branch_maps(step):
            moments = channel_moments(student, teacher, ~excluded)
            out[term] = Loss(student.new_full((), self.cfg.alpha), moments, of=_as(student.dtype))
        return out
