"""DeFeat (Guo et al., CVPR 2021): the neck's maps in objects and around them, weighed apart.

Of two detectors in two stages the heads too: classes of positive and of negative regions, weighed apart.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from yoloxkd.kd.adapters import AdapterKind
from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, softmax_divergence, squared_errors, weighted_sums
from yoloxkd.kd.functional.masks import box_levels, marked_cells, whole_cells
from yoloxkd.kd.methods.fgfi import ADAPTER_STD, LEVEL_BASE
from yoloxkd.kd.neck import NeckDistiller, NeckLevel
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.same_places import in_two_stages
from yoloxkd.kd.same_regions import SameRegions, TrainedRegions, region_means
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
    head_alpha: float = published(
        "defeat",
        "head_alpha",
        ge=0,
        description="weight of the classes of positive regions, where both have two stages",
    )
    head_beta: float = published(
        "defeat", "head_beta", ge=0, description="weight of the classes of negative regions, likewise"
    )
    head_tau: float = published("defeat", "head_tau", gt=0, description="temperature of the regions' classes")


class DeFeat(NeckDistiller):
    """DeFeat on the neck, whose weights are shared out among the paired levels, and on the heads of two-stage detectors.

    `head_fg` and `head_bg` are of the regions that the student trains on: the mean over the stages of a cascade.
    """

    Config = DeFeatConfig
    name: ClassVar[str] = "defeat"

    def __init__(self, cfg: DeFeatConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.adapter, ADAPTER_STD)
        self.cfg = cfg
        self.weights = {term: weight for term, weight in (("fg", cfg.alpha), ("bg", cfg.beta)) if weight > 0}
        neck = [LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights]
        heads = (("head_fg", cfg.head_alpha), ("head_bg", cfg.head_beta)) if in_two_stages(pairing) else ()
        self.head_weights = {term: weight for term, weight in heads if weight > 0}
        self.terms = (*neck, *(LossName(self.name, term) for term in self.head_weights))
        self.heads = SameRegions(pairing, self.name) if self.head_weights else None

    def compare(self, step: Step[Any]) -> Losses:
        out: Losses = {}
        for i, level in enumerate(self.levels(step)):
            share = len(self.pairing.levels) * level.teacher.shape[1]
            masks, error = self._masks(step, level, i), squared_errors(level.student, level.teacher)
            for term, weight in self.weights.items():
                mean = image_means(*weighted_sums(error, masks[term]))
                out[LossName(self.name, term, level.pair.stride)] = Loss(mean * (weight / share))
        if self.heads is not None:
            out |= self.heads.losses(self.name, self.head_weights, step, self._head)
        return out

    def _head(self, stage: TrainedRegions) -> dict[str, Tensor]:
        rows = softmax_divergence(stage.predictions.student, stage.predictions.teacher, self.cfg.head_tau)
        return {"head_fg": region_means(rows, stage.positive), "head_bg": region_means(rows, stage.negative)}

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
        boxes, objects, taught = step.batch.targets.boxes, step.batch.targets.mask, self.objects(step)
        if self.cfg.assign == "size":
            here = box_levels(boxes, len(self.pairing.levels), LEVEL_BASE * self.pairing.levels[0].stride) == index
            objects, taught = objects & here, taught & here
        cells, _ = whole_cells(boxes, level.size, level.cell)
        foreground = marked_cells(cells, taught, level.size)
        marked = foreground if self.answers_for_all else marked_cells(cells, objects, level.size)
        return {"fg": foreground & ~level.excluded, "bg": ~(marked | level.excluded)}
