"""Mimicking (Li et al., CVPR 2017): the neck's features in the regions that the student proposes.

Its second phase, of class and box outputs of a two-stage head, needs such a detector and is not served. A dense student has
no proposals: here these are its best boxes after suppression, which is a reading. In the tables of FGD and of others "mimic"
is the mean squared error of whole maps: `regions: whole`.
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
from yoloxkd.ops.points import within_content
from yoloxkd.types import Batch, Loss, Losses, LossName, RoIOutput

CANDIDATES, OVERLAP, LEAST_SIDE = 1000, 0.7, 0.0
"""Predictions that proposals are chosen from; overlap of two proposals, at most; px, as in region proposal networks."""
BINS, SAMPLES = 7, 2
"""Of pooled features, along a side."""


class MimicConfig(KDConfig):
    """Keys of `kd` for Mimicking; its second phase, on a head's outputs, needs a two-stage detector."""

    alpha: float = published("mimic", "alpha", ge=0, description="weight of the features' squared error (lambda)")
    regions: Literal["proposals", "whole"] = published(
        "mimic", "regions", description="the student's proposals, or whole maps, as other papers' tables have it"
    )
    k: int = published("mimic", "k", ge=1, le=1000, description="proposals of an image")


class Mimic(NeckDistiller):
    """Mimicking on the neck: of each region half the mean squared error; or that of whole maps, level by level."""

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
        named = whole if cfg.regions == "whole" else [LossName(self.name, "regions")]
        self.terms = tuple(named) if cfg.alpha > 0 else ()

    def compare(self, step: Step[Any]) -> Losses:
        return self._whole(step) if self.cfg.regions == "whole" else self._regions(step)

    def _whole(self, step: Step[Any]) -> Losses:
        out: Losses = {}
        for level in self.levels(step):
            found = image_means(*weighted_sums(squared_errors(level.student, level.teacher), ~level.excluded))
            out[LossName(self.name, "map", level.pair.stride)] = Loss(found * (self.cfg.alpha / level.teacher.shape[1]))
        return out

    def _regions(self, step: Step[Any]) -> Losses:
        levels = list(self.levels(step))
        boxes, used = self.proposals(step)
        level = region_levels(boxes, [each.pair.stride for each in levels])
        cells, excluded = [each.cell for each in levels], [each.excluded for each in levels]
        ours, theirs = (
            pooled_regions(maps, cells, boxes, level, used, bins=BINS, samples=SAMPLES, excluded=excluded)
            for maps in ([each.student for each in levels], [each.teacher for each in levels])
        )
        error = (ours - theirs).square().sum((1, 2, 3)) / (2 * ours[0, 0].numel())
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
    """(B, A) bool, locations in the picture and in no ignore region."""
    targets = batch.targets
    return within_content(points, batch.content) & ~touched_by_any(points, targets.boxes, targets.ignore)
