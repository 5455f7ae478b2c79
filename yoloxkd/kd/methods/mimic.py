"""Mimicking (Li et al., CVPR 2017): the neck's features in the regions that the student proposes.

Of two detectors in two stages, its second phase as well: what both heads say of these regions. A dense student has no
proposals: here these are its best boxes after suppression, which is a reading. In the tables of FGD and of others "mimic" is
the mean squared error of whole maps: `regions: whole`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, squared_errors, weighted_sums
from yoloxkd.kd.functional.importance import touched_by_any
from yoloxkd.kd.functional.regions import best_boxes, pooled_regions, region_levels
from yoloxkd.kd.neck import NeckDistiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.same_places import in_two_stages
from yoloxkd.kd.same_regions import SameRegions, region_means
from yoloxkd.ops.points import within_content
from yoloxkd.types import Batch, Loss, Losses, LossName, RoIOutput

CANDIDATES, OVERLAP, LEAST_SIDE = 1000, 0.7, 0.0
"""Predictions that proposals are chosen from; overlap of two proposals, at most; px, as in region proposal networks."""
BINS, SAMPLES = 7, 2
"""Of pooled features, along a side."""


class MimicConfig(KDConfig):
    """Keys of `kd` for Mimicking; neither weight could be checked against the paper."""

    alpha: float = published("mimic", "alpha", ge=0, description="weight of the features' squared error (lambda)")
    regions: Literal["proposals", "whole"] = published(
        "mimic", "regions", description="the student's proposals, or whole maps, as other papers' tables have it"
    )
    k: int = published("mimic", "k", ge=1, le=1000, description="proposals of an image")
    beta: float = published(
        "mimic", "beta", ge=0, description="weight of the heads' class logits and boxes, where both have two stages"
    )


class Mimic(NeckDistiller):
    """Mimicking on the neck: of each region half the mean squared error; or that of whole maps, level by level.

    `head_cls` and `head_box` are half the mean squared errors of the class logits and of the box code of the teacher's most
    probable class, by the first box heads.
    """

    Config = MimicConfig
    name: ClassVar[str] = "mimic"

    def __init__(self, cfg: MimicConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        if cfg.regions != "whole" and pairing.student.box_code.kind == "masks":
            raise UserError(
                "--kd mimic compares the regions that the student proposes, and this student predicts masks and no boxes; "
                "choose kd.regions=whole, or another --kd"
            )
        whole = [LossName(self.name, "map", level.stride) for level in pairing.levels]
        maps = whole if cfg.regions == "whole" else [LossName(self.name, "regions")]
        heads = cfg.beta > 0 and in_two_stages(pairing)
        self.heads = SameRegions(pairing, self.name) if heads else None
        of_heads = [LossName(self.name, term) for term in ("head_cls", "head_box")] if heads else []
        self.terms = (*(maps if cfg.alpha > 0 else ()), *of_heads)

    def compare(self, step: Step[Any]) -> Losses:
        out: Losses = {}
        if self.cfg.alpha > 0:
            out |= self._whole(step) if self.cfg.regions == "whole" else self._regions(step)
        return out if self.heads is None else out | self._heads(step, self.heads)

    def _heads(self, step: Step[Any], heads: SameRegions) -> Losses:
        boxes, used = self.proposals(step)
        predictions = heads(step, boxes)
        pairs = {"head_cls": (predictions.student, predictions.teacher), "head_box": predictions.codes()}
        errors = {term: (student - teacher).square().mean(-1) / 2 for term, (student, teacher) in pairs.items()}
        return {LossName(self.name, t): Loss(region_means(e, used) * self.cfg.beta) for t, e in errors.items()}

    def _whole(self, step: Step[Any]) -> Losses:
        out: Losses = {}
        for level in self.levels(step):
            error = image_means(*weighted_sums(squared_errors(level.student, level.teacher), ~level.excluded))
            out[LossName(self.name, "map", level.pair.stride)] = Loss(error * (self.cfg.alpha / level.teacher.shape[1]))
        return out

    def _regions(self, step: Step[Any]) -> Losses:
        levels = list(self.levels(step))
        boxes, used = self.proposals(step)
        level = region_levels(boxes, [each.pair.stride for each in levels])
        cells, excluded = [each.cell for each in levels], [each.excluded for each in levels]
        student_features, teacher_features = (
            pooled_regions(maps, cells, boxes, level, used, bins=BINS, samples=SAMPLES, excluded=excluded)
            for maps in ([each.student for each in levels], [each.teacher for each in levels])
        )
        error = (student_features - teacher_features).square().sum((1, 2, 3)) / (2 * student_features[0, 0].numel())
        return {LossName(self.name, "regions"): Loss(image_means(error, used.sum(1)) * self.cfg.alpha)}

    @torch.no_grad()
    def proposals(self, step: Step[Any]) -> tuple[Tensor, Tensor]:
        """Boxes (B, k, 4) px of what the student proposes, and which of them there are (B, k) bool."""
        out, k = step.student, self.cfg.k
        if isinstance(out, RoIOutput):
            return out.proposals[:, :k].detach(), out.valid[:, :k]
        boxes, scores = step.models.student.candidates(out)
        score = scores.detach().amax(-1).masked_fill(~_counted(out.grid.points, step.batch), -torch.inf)
        best = score.topk(min(CANDIDATES, score.shape[1]))
        boxes = boxes.detach().gather(1, best.indices[..., None].expand(-1, -1, 4))
        index, used = best_boxes(boxes, best.values, k, OVERLAP, LEAST_SIDE)
        return boxes.gather(1, index[..., None].expand(-1, -1, 4)), used


def _counted(points: Tensor, batch: Batch) -> Tensor:
    """(B, A) bool, locations in the image and in no ignore region."""
    targets = batch.targets
    return within_content(points, batch.content) & ~touched_by_any(points, targets.boxes, targets.ignore)
