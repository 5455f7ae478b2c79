"""Channel-wise Distillation (CWD, Shu et al., ICCV 2021): every channel of a map as a distribution over its cells."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.neck import Branch, BranchDistiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses

OUT_OF_SIGHT = -1e4
"""Takes the place of a cell that does not count: no probability, and finite even where no cell counts."""
EPS = 1e-5
"""Added to a channel's variance where channels are normalized: that of a batch norm."""


class CWDConfig(KDConfig):
    """Keys of `kd` for CWD."""

    tau: float = published("cwd", "tau", gt=0, description="temperature of the distributions")
    alpha: float = published("cwd", "alpha", ge=0, description="weight of the divergence, on every level")
    branches: list[Branch] = published("cwd", "branches", min_length=1, description="maps that are distilled")
    normalize: bool = Field(
        False,
        description="bring every channel to deviation 1 in each image of both maps first; YOLO recipes: in each batch",
    )


@without_autocast
def channel_divergence(student: Tensor, teacher: Tensor, tau: float, excluded: Tensor | None = None) -> Tensor:
    """tau² / C times the sum over channels of KL(teacher's || student's), averaged over images. CWD eq. (2) to (4).

    Args:
        student, teacher: (B, C, h, w); a channel's distribution is the softmax of its cells / tau
        excluded: (B, h, w) bool, cells that belong to no distribution
    """
    maps = [full_precision(student).flatten(2), full_precision(teacher).detach().flatten(2)]
    if excluded is not None:
        maps = [x.masked_fill(excluded.flatten(1)[:, None], OUT_OF_SIGHT * tau) for x in maps]
    log_student, log_teacher = ((x / tau).log_softmax(2) for x in maps)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * (tau * tau / (student.shape[0] * student.shape[1]))


@without_autocast
def normalized(x: Tensor, excluded: Tensor | None = None) -> Tensor:
    """A map whose channels have mean 0 and deviation 1 in every image, a batch norm without scale for each image.

    x (B, C, h, w); excluded (B, h, w) bool, cells that are not in mean and deviation
    """
    x = full_precision(x)
    counted = x.new_ones(x.shape[0], *x.shape[2:]) if excluded is None else (~excluded).to(x.dtype)
    share = (counted / counted.sum((1, 2), keepdim=True).clamp_min(1)).unsqueeze(1)
    centered = x - (x * share).sum((2, 3), keepdim=True)
    variance = (centered.square() * share).sum((2, 3), keepdim=True)
    return centered * (variance + EPS).rsqrt()


class CWD(BranchDistiller):
    """CWD on every paired level of the chosen maps."""

    Config = CWDConfig
    name: ClassVar[str] = "cwd"

    def __init__(self, cfg: CWDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.branches, cfg.alpha)
        self.cfg = cfg

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        out: Losses = {}
        for term, student, teacher, excluded in self.branch_maps(step):
            if self.cfg.normalize:
                student, teacher = normalized(student, excluded), normalized(teacher, excluded)
            out[term] = Loss(channel_divergence(student, teacher, self.cfg.tau, excluded) * self.cfg.alpha)
        return out
