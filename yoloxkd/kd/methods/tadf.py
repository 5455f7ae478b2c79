"""Task Adaptive Distillation Framework (TADF, Sun et al., 2020): objects under a Gaussian, and heads on shared proposals.

No code of the authors is public. This is a reading: the Gaussian mask, and the divergence of positive regions' classes, that
DeFeat's release has for the comparison; boxes where the teacher's is better than the proposal.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from yoloxkd.kd.adapters import AdapterKind
from yoloxkd.kd.base import Decay, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import bernoulli_divergence, image_means, squared_errors, weighted_sums
from yoloxkd.kd.functional.masks import box_levels, gaussian_cells, whole_cells
from yoloxkd.kd.methods.defeat import Assign
from yoloxkd.kd.methods.fgfi import ADAPTER_STD, LEVEL_BASE
from yoloxkd.kd.neck import NeckDistiller, NeckLevel
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.same_places import in_two_stages
from yoloxkd.kd.same_regions import SameRegions, TrainedRegions, region_means
from yoloxkd.ops.boxes import paired_iou
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName


class TADFConfig(KDConfig):
    """Keys of `kd` for TADF, as DeFeat's release reads it; no weight could be checked against the paper."""

    alpha: float = published("tadf", "alpha", ge=0, description="weight of the squared error under the Gaussians")
    assign: Assign = published(
        "tadf", "assign", description="levels on which an object has its Gaussian: the one of its size, or all"
    )
    adapter: AdapterKind = published("tadf", "adapter", description="1x1 where channels differ, or 3x3 everywhere")
    head_alpha: float = published(
        "tadf", "head_alpha", ge=0, description="weight of the classes of positive regions, where both have two stages"
    )
    head_beta: float = published(
        "tadf", "head_beta", ge=0, description="weight of their boxes, where the teacher's is better than the region"
    )
    decay: Decay = published("tadf", "decay", description="how the factor falls to decay_floor")


class TADF(NeckDistiller):
    """TADF's Gaussian masks on the neck, whose weight is shared out among the paired levels, and the heads of two stages.

    `head_cls` and `head_box` are of the positives that the student trains on: the mean over the stages of a cascade.
    """

    Config = TADFConfig
    name: ClassVar[str] = "tadf"

    def __init__(self, cfg: TADFConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.adapter, ADAPTER_STD)
        self.cfg = cfg
        levels = pairing.levels if cfg.alpha > 0 else ()
        neck = [LossName(self.name, "gauss", level.stride) for level in levels]
        heads = (("head_cls", cfg.head_alpha), ("head_box", cfg.head_beta)) if in_two_stages(pairing) else ()
        self.head_weights = {term: weight for term, weight in heads if weight > 0}
        self.terms = (*neck, *(LossName(self.name, term) for term in self.head_weights))
        self.heads = SameRegions(pairing, self.name) if self.head_weights else None

    def compare(self, step: Step[Any]) -> Losses:
        out: Losses = {}
        for i, level in enumerate(self.levels(step) if self.cfg.alpha > 0 else ()):
            error = image_means(
                *weighted_sums(squared_errors(level.student, level.teacher), self._gaussians(step, level, i))
            )
            share = len(self.pairing.levels) * level.teacher.shape[1]
            out[LossName(self.name, "gauss", level.pair.stride)] = Loss(error * (self.cfg.alpha / share))
        if self.heads is not None:
            out |= self.heads.losses(self.name, self.head_weights, step, self._head)
        return out

    def _head(self, stage: TrainedRegions) -> dict[str, Tensor]:
        predictions = stage.predictions
        classes = bernoulli_divergence(predictions.student.softmax(-1), predictions.teacher.softmax(-1)).mean(-1)
        student, teacher = predictions.codes()
        better = paired_iou(predictions.boxes[1], stage.truth) > paired_iou(predictions.regions, stage.truth)
        boxes = (student - teacher).abs().mean(-1).where(better, 0.0)
        return {"head_cls": region_means(classes, stage.positive), "head_box": region_means(boxes, stage.positive)}

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
