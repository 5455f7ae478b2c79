"""Localisation Distillation (LD, Zheng et al., CVPR 2022): the student's box distributions follow the teacher's.

For detectors that predict, for each side of a box, a distribution over distances (GFL).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.base import Context, Distiller, KDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.precision import full_precision, without_autocast
from yoloxkd.nn.assigners.atss import TOPK, atss_match
from yoloxkd.nn.assigners.match import Positives
from yoloxkd.types import Batch, DenseOutput


class LDConfig(KDConfig):
    """Keys of `kd` for LD."""

    tau: float = Field(10.0, gt=0, description="temperature of the distributions")
    alpha: float = Field(0.75, ge=0, description="weight of the divergence at the student's positive locations")


@without_autocast
def localisation_divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau² times the mean over sides and bins of p_T log(p_T / p_S), p the softmax of logits / tau. LD eq. (3).

    student, teacher (..., 4 n) logits of n bins for left, top, right and bottom -> (...). The paper sums over bins; the
    published code takes the mean, and its weights belong to that.
    """
    ours = (full_precision(student).unflatten(-1, (4, -1)) / tau).log_softmax(-1)
    theirs = (full_precision(teacher).detach().unflatten(-1, (4, -1)) / tau).log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).mean((-1, -2)) * (tau * tau)


class LD(Distiller):
    """LD at the student's positive locations (the paper's main region) on every paired level.

    A location counts with the student's largest class probability there. The sum over an image's locations is averaged
    over images.
    """

    Config = LDConfig
    name: ClassVar[str] = "ld"

    def __init__(self, cfg: LDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        for who, bins in zip(("student", "teacher"), pairing.bins, strict=True):
            if bins is None:
                raise UserError(
                    f"--kd ld distils distributions of box sides, which only gfl detectors predict, and the {who} predicts "
                    f"its boxes directly; choose a gfl {who}, or another --kd"
                )
        if pairing.bins[0] != pairing.bins[1]:
            raise UserError(
                f"--kd ld needs distributions of equal length, and the student has {pairing.bins[0]} bins a side, the "
                f"teacher {pairing.bins[1]}; give the student the teacher's reg_max"
            )
        self.cfg = cfg
        self.needs = ()
        self.terms = tuple(f"sides/s{level.stride}" for level in pairing.levels) if cfg.alpha > 0 else ()

    def compare(self, student: DenseOutput, teacher: DenseOutput, batch: Batch, context: Context) -> dict[str, Tensor]:
        match = atss_match(student.points, student.strides, student.sizes, batch.targets)
        most = TOPK * len(student.levels)
        found = Positives.of(match, batch.targets, student.points, student.strides, most)
        sides = localisation_divergence(
            found.at(student.box_raw), found.at(self._beside(student, teacher)), self.cfg.tau
        )
        weighted = sides * found.at(student.cls_logits.detach()).sigmoid().amax(-1)
        scale = self.cfg.alpha / batch.images.shape[0]
        return {
            f"sides/s{level.stride}": found.total(weighted * (found.strides == level.stride)) * scale
            for level in self.pairing.levels
        }

    def _beside(self, student: DenseOutput, teacher: DenseOutput) -> Tensor:
        """The teacher's logits at the student's locations (B, A, 4 n); zero on levels that are not paired."""
        theirs = teacher.box_raw.split([h * w for h, w in teacher.sizes], 1)
        by_level = {level.student: theirs[level.teacher] for level in self.pairing.levels}
        empty = teacher.box_raw[:, :1]
        return torch.cat(
            [
                by_level[i] if i in by_level else torch.zeros_like(empty).expand(-1, h * w, -1)
                for i, (h, w) in enumerate(student.sizes)
            ],
            1,
        )
