"""Chen et al. (Learning Efficient Object Detection Models with Knowledge Distillation, NIPS 2017), on dense detectors.

Written for two-stage detectors, whose heads see the same regions. On a dense detector the places are its locations, which is a
reading: `hint` on the neck's maps, `cls` with a greater weight on background, `box` bounded by the teacher.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, squared_errors, weighted_sums
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.neck import NeckDistiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.same_places import Places, SamePlaces
from yoloxkd.ops.boxes import to_center
from yoloxkd.types import DenseOutput, Loss, Losses, LossName


class ChenConfig(KDConfig):
    """Keys of `kd` for Chen et al., read for dense detectors: their paper has two-stage ones."""

    alpha: float = published("chen", "alpha", ge=0, description="weight of the classes' divergence")
    background: float = published(
        "chen", "background", ge=0, description="its factor where the student has no positive"
    )
    beta: float = published("chen", "beta", ge=0, description="weight of the bounded box error (nu)")
    margin: float = published(
        "chen", "margin", ge=0, description="a box as much better than the teacher's is not pulled further (m)"
    )
    gamma: float = published("chen", "gamma", ge=0, description="weight of the mean squared error of the maps")


@without_autocast
def bounded_error(student: Tensor, teacher: Tensor, truth: Tensor, margin: float) -> Tensor:
    """Squared error of the student's box against the truth, where it is no better than the teacher's by `margin`. Eq. (4).

    student, teacher, truth (..., 4) px -> (...). Errors are of the center's shift in sides of the true box and of the
    logarithm of the sides; a side counts as at least a pixel. It pulls towards the truth, not towards the teacher.
    """
    ours, theirs = _off(student, truth), _off(teacher.detach(), truth)
    return ours.where(ours + margin > theirs, 0.0)


def _off(boxes: Tensor, truth: Tensor) -> Tensor:
    center, side = to_center(full_precision(boxes)).split(2, -1)
    of, unit = to_center(full_precision(truth)).split(2, -1)
    unit = unit.clamp_min(1.0)
    squares: Tensor = ((center - of) / unit).square() + (side.clamp_min(1.0) / unit).log().square()
    return squares.sum(-1)


class Chen(NeckDistiller):
    """Chen et al. on every paired level: `hint` level by level, `cls` and `box` of all locations together."""

    Config = ChenConfig
    name: ClassVar[str] = "chen"

    def __init__(self, cfg: ChenConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        self.weights = {term: w for term, w in (("cls", cfg.alpha), ("box", cfg.beta)) if w > 0}
        self.places = SamePlaces(pairing, self.name)
        hints = [LossName(self.name, "hint", level.stride) for level in pairing.levels if cfg.gamma > 0]
        self.terms = (*hints, *(LossName(self.name, term) for term in self.weights))

    def compare(self, step: Step[DenseOutput]) -> Losses:
        out: Losses = {}
        for level in self.levels(step) if self.cfg.gamma > 0 else ():
            found = image_means(*weighted_sums(squared_errors(level.student, level.teacher), ~level.excluded))
            weight = self.cfg.gamma / level.teacher.shape[1]
            out[LossName(self.name, "hint", level.pair.stride)] = Loss(found * weight)
        if self.weights:
            terms = self._predictions(step, self.places(step))
            out |= {LossName(self.name, term): Loss(terms[term] * w) for term, w in self.weights.items()}
        return out

    def _predictions(self, step: Step[DenseOutput], places: Places) -> dict[str, Tensor]:
        """Sums over locations, divided by an image's positives, averaged over images."""
        positive = places.student.at_places(step.match.fg)
        count = positive.sum(1)
        rows = places.divergence()
        weight = torch.where(positive, 1.0, self.cfg.background) * places.counted(step.batch)
        truth = self._truth(step, places)
        wrong = bounded_error(places.student.boxes, places.teacher.boxes, truth, self.cfg.margin)
        return {
            "cls": ((rows * weight).sum(1) / count.clamp_min(1)).mean(),
            "box": image_means(wrong.masked_fill(~positive, 0.0).sum(1), count),
        }

    def _truth(self, step: Step[DenseOutput], places: Places) -> Tensor:
        """(B, N, 4) px, the box that each positive answers for."""
        boxes = step.batch.targets.boxes
        if boxes.shape[1] == 0:
            return torch.zeros_like(places.student.boxes)
        row = places.student.at_places(step.match.gt).clamp_min(0)
        return boxes.gather(1, row[..., None].expand(-1, -1, 4))
