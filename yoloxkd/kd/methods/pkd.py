"""Pearson correlation distillation (PKD, Cao et al., NeurIPS 2022): the neck's channels, each normalized over the batch.

Nothing depends on how strong a channel is, so that detectors of different families can teach each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.correlation import channel_moments, correlation_loss
from yoloxkd.kd.functional.masks import excluded_cells
from yoloxkd.kd.methods.pgd import TAPS, Branch
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName


class PKDConfig(KDConfig):
    """Keys of `kd` for PKD."""

    alpha: float = published("pkd", "alpha", ge=0, description="weight of the difference, on every level")
    branches: list[Branch] = published("pkd", "branches", min_length=1, description="maps that are distilled")


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda moments: correlation_loss(moments).to(dtype)


class PKD(Distiller):
    """PKD on every paired level of the chosen maps.

    A channel's mean and deviation are those of the whole batch of the step, over its parts and processes; cells of padding
    and ignore regions are not in them.
    """

    Config = PKDConfig
    name: ClassVar[str] = "pkd"
    counted = True

    def __init__(self, cfg: PKDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        self.branches: tuple[Branch, ...] = tuple(dict.fromkeys(cfg.branches))
        taps = [TAPS[branch] for branch in self.branches]
        self.needs = frozenset(taps)
        self.adapters = Adapters(pairing, taps)
        named = [LossName(self.name, branch, level.stride) for level in pairing.levels for branch in self.branches]
        self.terms = tuple(named) if cfg.alpha > 0 else ()

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        out: Losses = {}
        for level in self.pairing.levels:
            for branch in self.branches:
                tap = TAPS[branch]
                ours, theirs = step.maps(tap, level)
                ours = self.adapters(ours, theirs, tap, level)
                excluded = excluded_cells(step.batch, (theirs.shape[2], theirs.shape[3]), step.teacher.image_size)
                moments = channel_moments(ours, theirs, ~excluded)
                weight = ours.new_full((), self.cfg.alpha)
                out[LossName(self.name, branch, level.stride)] = Loss(weight, moments, of=_as(ours.dtype))
        return out
