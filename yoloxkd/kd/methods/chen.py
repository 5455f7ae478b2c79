"""Chen et al. (Learning Efficient Object Detection Models with Knowledge Distillation, NIPS 2017).

`hint` on the neck's maps, `cls` with a greater weight on background, `box` bounded by the teacher. Written for two-stage
detectors: there `cls` and `box` are of the head's regions, `rpn_cls` and `rpn_box` of the proposal network. On a dense detector
the places are its locations, which is a reading.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, squared_errors, weighted_sums
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.functional.predictions import box_code
from yoloxkd.kd.neck import NeckDistiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.same_places import Places, SamePlaces, in_two_stages, of_locations
from yoloxkd.kd.same_regions import SameRegions, TrainedRegions, region_means
from yoloxkd.nn.assigners.match import matched_boxes
from yoloxkd.types import DenseOutput, Loss, Losses, LossName


class ChenConfig(KDConfig):
    """Keys of `kd` for Chen et al.; the weight of the maps, gamma, and the margin could not be checked against the paper."""

    alpha: float = published("chen", "alpha", ge=0, description="weight of the classes' divergence")
    background: float = published(
        "chen",
        "background",
        ge=0,
        description="its factor for the background class of heads, and where the student has no positive",
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
    student_error, teacher_error = (box_code(x, truth).square().sum(-1) for x in (student, teacher.detach()))
    return student_error.where(student_error + margin > teacher_error, 0.0)


@without_autocast
def weighted_cross_entropy(student: Tensor, teacher: Tensor, background: float) -> Tensor:
    """-sum over classes of w P_T log P_S, w = `background` for the last class and 1 for others. Eq. (3).

    student, teacher (..., K + 1) logits -> (...)
    """
    entropy = -full_precision(teacher).detach().softmax(-1) * full_precision(student).log_softmax(-1)
    return entropy[..., :-1].sum(-1) + background * entropy[..., -1]


class Chen(NeckDistiller):
    """Chen et al. on every paired level: `hint` level by level, `cls` and `box` of all locations, or regions, together."""

    Config = ChenConfig
    name: ClassVar[str] = "chen"

    def __init__(self, cfg: ChenConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        two_stages = in_two_stages(pairing)
        weights = {"cls": cfg.alpha, "box": cfg.beta}
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.of_locations = "rpn_" if two_stages else ""  # how terms of locations begin
        self.heads = SameRegions(pairing, self.name) if two_stages and self.weights else None
        self.places = SamePlaces(pairing, self.name)
        hints = [LossName(self.name, "hint", level.stride) for level in pairing.levels if cfg.gamma > 0]
        kinds = dict.fromkeys((self.of_locations, "")) if self.weights else ()
        self.terms = (*hints, *(LossName(self.name, kind + term) for kind in kinds for term in self.weights))

    def compare(self, step: Step[Any]) -> Losses:
        out: Losses = {}
        for level in self.levels(step) if self.cfg.gamma > 0 else ():
            error = image_means(*weighted_sums(squared_errors(level.student, level.teacher), ~level.excluded))
            weight = self.cfg.gamma / level.teacher.shape[1]
            out[LossName(self.name, "hint", level.pair.stride)] = Loss(error * weight)
        if self.weights:
            terms = self._predictions(of_locations(step), self.places(step))
            out |= {LossName(self.name, self.of_locations + t): Loss(terms[t] * w) for t, w in self.weights.items()}
        if self.heads is not None:
            out |= self.heads.losses(self.name, self.weights, step, self._head)
        return out

    def _head(self, stage: TrainedRegions) -> dict[str, Tensor]:
        """Means over the regions that the student trains on, and over their positives."""
        predictions = stage.predictions
        divergence = weighted_cross_entropy(predictions.student, predictions.teacher, self.cfg.background)
        errors = bounded_error(*predictions.boxes, stage.truth, self.cfg.margin)
        return {
            "cls": region_means(divergence, stage.positive | stage.negative),
            "box": region_means(errors, stage.positive),
        }

    def _predictions(self, step: Step[DenseOutput], places: Places) -> dict[str, Tensor]:
        """Sums over locations, divided by an image's positives, averaged over images."""
        positive = places.student.at_places(step.match.fg)
        count = positive.sum(1)
        divergence = places.divergence()
        weight = torch.where(positive, 1.0, self.cfg.background) * places.counted(step.batch)
        if self.heads is not None:  # a proposal network trains on some of its anchors
            weight = weight * ~places.student.at_places(step.match.ignored)
        truth = places.student.at_places(matched_boxes(step.match, step.batch.targets))
        errors = bounded_error(places.student.boxes, places.teacher.boxes, truth, self.cfg.margin)
        return {
            "cls": ((divergence * weight).sum(1) / count.clamp_min(1)).mean(),
            "box": image_means(errors.masked_fill(~positive, 0.0).sum(1), count),
        }
