"""DeFeat (Guo et al., CVPR 2021): the neck's maps in objects and around them, weighed apart.

The paper distils the heads of two-stage detectors so as well, positive and negative regions apart: `region_divergence`
has that term, and this package does not serve it, for it needs both heads on the same regions.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from yoloxkd.kd.adapters import AdapterKind
from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, squared_errors, weighted_sums
from yoloxkd.kd.functional.masks import box_levels, marked_cells, whole_cells
from yoloxkd.kd.methods.fgfi import ADAPTER_STD, LEVEL_BASE
from yoloxkd.kd.neck import NeckDistiller, NeckLevel
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName

Assign = Literal["size", "all"]


class DeFeatConfig(KDConfig):
    """Keys of `kd` for DeFeat."""

    alpha: float = published("defeat", "alpha", ge=0, description="weight of the mean squared error in objects")
    beta: float = published("defeat", "beta", ge=0, description="weight of the mean squared error around them")
    assign: Assign = published(
        "defeat", "assign", description="levels on which an object is foreground: the one of its size, or all"
    )
    adapter: AdapterKind = published("defeat", "adapter", description="1x1 where channels differ, or 3x3 everywhere")


class DeFeat(NeckDistiller):
    """DeFeat on the neck; the weights are shared out among the paired levels."""

    Config = DeFeatConfig
    name: ClassVar[str] = "defeat"

    def __init__(self, cfg: DeFeatConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.adapter, ADAPTER_STD)
        self.cfg = cfg
        self.weights = {term: weight for term, weight in (("fg", cfg.alpha), ("bg", cfg.beta)) if weight > 0}
        self.terms = tuple(LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights)

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        out: Losses = {}
        for i, level in enumerate(self.levels(step)):
            share = len(self.pairing.levels) * level.teacher.shape[1]
            masks, error = self._masks(step, level, i), squared_errors(level.student, level.teacher)
            for term, weight in self.weights.items():
                found = image_means(*weighted_sums(error, masks[term]))
                out[LossName(self.name, term, level.pair.stride)] = Loss(found * (weight / share))
        return out

    def maps(self, step: Step[DetectorOutput]) -> dict[str, Tensor]:
        """Foreground and background."""
        out = {}
        for i, level in enumerate(self.levels(step)):
            masks = self._masks(step, level, i)
            for term, what in (("fg", "foreground"), ("bg", "background")):
                out[f"{what}, stride {level.pair.stride}"] = masks[term].float()
        return out

    def _masks(self, step: Step[DetectorOutput], level: NeckLevel, index: int) -> dict[str, Tensor]:
        """Foreground and background of the level at `index` among the paired ones: (B, h, w) bool each.

        Objects that another teacher answers for are neither.
        """
        boxes, everyone, own = step.batch.targets.boxes, step.batch.targets.mask, self.objects(step)
        if self.cfg.assign == "size":
            here = box_levels(boxes, len(self.pairing.levels), LEVEL_BASE * self.pairing.levels[0].stride) == index
            everyone, own = everyone & here, own & here
        cells, _ = whole_cells(boxes, level.size, level.cell)
        foreground = marked_cells(cells, own, level.size)
        marked = foreground if self.answers_for_all else marked_cells(cells, everyone, level.size)
        return {"fg": foreground & ~level.excluded, "bg": ~(marked | level.excluded)}
