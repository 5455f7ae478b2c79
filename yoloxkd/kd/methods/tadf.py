"""Task Adaptive Distillation Framework (TADF, Sun et al., 2020), its neck part: objects under a Gaussian.

No code of the authors is public. This is a reading: the Gaussian mask that DeFeat's release has for the comparison, with
DeFeat's normalization. The paper's head terms, of proposals where the teacher is better, need a two-stage detector and are
not served.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from yoloxkd.kd.adapters import AdapterKind
from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, squared_errors, weighted_sums
from yoloxkd.kd.functional.masks import box_levels, gaussian_cells, whole_cells
from yoloxkd.kd.methods.defeat import Assign
from yoloxkd.kd.methods.fgfi import ADAPTER_STD, LEVEL_BASE
from yoloxkd.kd.neck import NeckDistiller, NeckLevel
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName


class TADFConfig(KDConfig):
    """Keys of `kd` for TADF, as DeFeat's release reads it for the neck; its head terms need a two-stage detector."""

    alpha: float = published("tadf", "alpha", ge=0, description="weight of the squared error under the Gaussians")
    assign: Assign = published(
        "tadf", "assign", description="levels on which an object has its Gaussian: the one of its size, or all"
    )
    adapter: AdapterKind = published("tadf", "adapter", description="1x1 where channels differ, or 3x3 everywhere")


class TADF(NeckDistiller):
    """TADF's Gaussian masks on the neck; the weight is shared out among the paired levels."""

    Config = TADFConfig
    name: ClassVar[str] = "tadf"

    def __init__(self, cfg: TADFConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.adapter, ADAPTER_STD)
        self.cfg = cfg
        levels = pairing.levels if cfg.alpha > 0 else ()
        self.terms = tuple(LossName(self.name, "gauss", level.stride) for level in levels)

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        out: Losses = {}
        for i, level in enumerate(self.levels(step)):
            found = image_means(
                *weighted_sums(squared_errors(level.student, level.teacher), self._gaussians(step, level, i))
            )
            share = len(self.pairing.levels) * level.teacher.shape[1]
            out[LossName(self.name, "gauss", level.pair.stride)] = Loss(found * (self.cfg.alpha / share))
        return out

    def maps(self, step: Step[DetectorOutput]) -> dict[str, Tensor]:
        """The Gaussians."""
        levels = enumerate(self.levels(step))
        return {f"Gaussians, stride {level.pair.stride}": self._gaussians(step, level, i) for i, level in levels}

    def _gaussians(self, step: Step[DetectorOutput], level: NeckLevel, index: int) -> Tensor:
        """(B, h, w) weights of the level at `index` among the paired ones."""
        boxes, rows = step.batch.targets.boxes, self.objects(step)
        if self.cfg.assign == "size":
            base = LEVEL_BASE * self.pairing.levels[0].stride
            rows = rows & (box_levels(boxes, len(self.pairing.levels), base) == index)
        cells, thin = whole_cells(boxes, level.size, level.cell)
        return gaussian_cells(cells, thin, rows, level.size).masked_fill(level.excluded, 0.0)
