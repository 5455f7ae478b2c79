"""Feature-Richness Score (FRS, Du et al., NeurIPS 2021): maps and classes where the teacher sees any object.

The score of a location is the teacher's largest class probability there; no ground truth is read. Of two detectors in
two stages it is the objectness of the teacher's proposal network.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from yoloxkd.kd.adapters import AdapterKind
from yoloxkd.kd.base import KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.divergence import image_means, squared_errors, weighted_sums
from yoloxkd.kd.neck import NeckDistiller
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.same_places import Places, SamePlaces
from yoloxkd.types import DenseOutput, Loss, Losses, LossName


class FRSConfig(KDConfig):
    """Keys of `kd` for FRS."""

    alpha: float = published("frs", "alpha", ge=0, description="weight of the maps' squared error, on every level")
    beta: float = published("frs", "beta", ge=0, description="weight of the classes' divergence, on every level")
    adapter: AdapterKind = published("frs", "adapter", description="1x1 where channels differ, or 3x3 everywhere")
    warmup: float = published(
        "frs", "warmup", ge=0, description="epochs (or part of one) over which the factor grows linearly"
    )


class FRS(NeckDistiller):
    """FRS on every paired level: `feat`, the neck's maps, and `cls`, the class probabilities."""

    Config = FRSConfig
    name: ClassVar[str] = "frs"

    def __init__(self, cfg: FRSConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing, cfg.adapter)
        self.cfg = cfg
        self.places = SamePlaces(pairing, self.name)
        self.weights = {term: weight for term, weight in (("feat", cfg.alpha), ("cls", cfg.beta)) if weight > 0}
        self.terms = tuple(LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights)

    def compare(self, step: Step[DenseOutput]) -> Losses:
        places = self.places(step)
        score = self._score(step, places)
        richness = places.grid.by_level(score)
        divergences = places.grid.by_level(places.divergence())
        out: Losses = {}
        for level, weight, divergence in zip(self.levels(step), richness, divergences, strict=True):
            cells = weight.amax(-1)
            if "feat" in self.weights:
                mean = image_means(*weighted_sums(squared_errors(level.student, level.teacher), cells))
                out[LossName(self.name, "feat", level.pair.stride)] = Loss(mean * self.weights["feat"])
            if "cls" in self.weights:
                mean = image_means(*weighted_sums(divergence.sum(-1), cells))
                out[LossName(self.name, "cls", level.pair.stride)] = Loss(mean * self.weights["cls"])
        return out

    def maps(self, step: Step[DenseOutput]) -> dict[str, Tensor]:
        """The score of each cell."""
        places = self.places(step)
        score = places.grid.by_level(self._score(step, places))
        levels = zip(self.pairing.levels, score, strict=True)
        return {f"richness, stride {level.stride}": value.amax(-1) for level, value in levels}

    def _score(self, step: Step[DenseOutput], places: Places) -> Tensor:
        """(B, N) the teacher's largest class probability, 0 on padding and in ignore regions."""
        return places.teacher.score() * places.counted(step.batch)
