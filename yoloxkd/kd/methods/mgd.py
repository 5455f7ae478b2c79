"""Masked Generative Distillation (MGD, Yang et al., ECCV 2022): from a student's map with holes, make the teacher's."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from yoloxkd.kd.adapters import Adapters
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.masks import excluded_cells
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName, Tap


class MGDConfig(KDConfig):
    """Keys of `kd` for MGD."""

    alpha: float = published("mgd", "alpha", ge=0, description="weight of the squared error, on every level")
    mask_ratio: float = published(
        "mgd", "mask_ratio", ge=0, lt=1, description="part of the student's cells that are masked (the paper's lambda)"
    )


def generation(channels: int) -> nn.Sequential:
    """The block that fills the holes: 3x3 convolution, ReLU, 3x3 convolution. MGD eq. (5)."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )


@without_autocast
def generated_error(
    student: Tensor, teacher: Tensor, visible: Tensor, block: nn.Module, excluded: Tensor | None = None
) -> Tensor:
    """Sum of (T - block(S * visible))², averaged over images, before alpha. MGD eq. (4) to (6).

    Args:
        student, teacher: (B, C, h, w); visible (B, h, w) of 0 and 1, alike in all channels
        excluded: (B, h, w) bool, cells whose error does not count
    """
    made: Tensor = block(full_precision(student) * visible[:, None])
    error = (made - full_precision(teacher).detach()).square().sum(1)
    if excluded is not None:
        error = error.masked_fill(excluded, 0.0)
    return error.sum() / student.shape[0]


def _mixed(seed: int, step: int) -> int:
    """One seed of 32 bits, which is all that the CPU's generator looks at."""
    return (seed * 1_000_003 + step) % 2**32


class MGD(Distiller):
    """MGD on every paired level of the neck.

    What is hidden is drawn anew at every step, from the run's seed and the step's number, for the whole batch of the step:
    each process takes what belongs to its images.
    """

    Config = MGDConfig
    name: ClassVar[str] = "mgd"

    def __init__(self, cfg: MGDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        self.needs = frozenset({Tap.NECK})
        self.adapters = Adapters(pairing, self.needs)
        self.blocks = nn.ModuleDict(
            {f"s{level.stride}": generation(pairing.channels(Tap.NECK, level)[1]) for level in pairing.levels}
        )
        levels = pairing.levels if cfg.alpha > 0 else ()
        self.terms = tuple(LossName(self.name, "generated", level.stride) for level in levels)

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        draws = torch.Generator().manual_seed(_mixed(step.seed, step.number))  # the CPU's: devices draw differently
        first, every = step.batch.place
        out: Losses = {}
        for level in self.pairing.levels:
            student_map, teacher_map = step.maps(Tap.NECK, level)
            student_map = self.adapters(student_map, teacher_map, Tap.NECK, level)
            size = (teacher_map.shape[2], teacher_map.shape[3])
            uniform = torch.rand(teacher_map.shape[0] * every, *size, generator=draws)[first::every]
            if student_map.device.type == "cuda":
                uniform = uniform.pin_memory().to(student_map.device, non_blocking=True)
            excluded = excluded_cells(step.batch, size, step.teacher.image_size)
            visible = (uniform >= self.cfg.mask_ratio).to(student_map.dtype)
            error = generated_error(student_map, teacher_map, visible, self.blocks[f"s{level.stride}"], excluded)
            out[LossName(self.name, "generated", level.stride)] = Loss(error * self.cfg.alpha)
        return out
