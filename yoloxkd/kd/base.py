"""The `Distiller` contract, and what it speaks of: keys of a method, a step, a teacher."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from yoloxkd.config.strict import Strict
from yoloxkd.errors import UserError
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, DetectorOutput, Losses, LossName, Tap

Decay = Literal["none", "linear", "cosine"]


class KDConfig(Strict):
    """Keys that every distillation method has."""

    weight: float | Literal["auto"] = Field(
        1.0, description="factor on all terms; auto: to auto_share of the task loss"
    )
    auto_share: float = Field(0.5, gt=0, description="with weight auto: the method's terms as a share of the task loss")
    auto_iterations: int = Field(100, ge=1, description="with weight auto: iterations measured, then fixed")
    auto: Literal["loss", "gradient"] = Field(
        "loss",
        description="what weight auto measures: losses from the start, or gradients on backbone and neck, those after the "
        "learning rate's warm-up for good",
    )
    auto_every: int = Field(
        20, ge=1, description="with auto gradient: steps between measurements, two backward passes each"
    )
    warmup: float = Field(0.0, ge=0, description="epochs (or part of one) over which the factor grows linearly")
    stop_epoch: int | None = Field(None, ge=0, description="distil the first so many epochs only; None: all")
    decay: Decay = Field("none", description="how the factor falls to decay_floor")
    decay_floor: float = Field(0.0, ge=0, lt=1, description="what decay leaves of the factor")
    decay_epochs: float | None = Field(
        None, gt=0, description="epochs after which decay has reached its floor; None: when the distillation ends"
    )
    inherit: bool = Field(False, description="start neck and head from the teacher's where shapes agree")
    max_nonfinite: int = Field(10, ge=0, description="stop the run when more terms than this were not finite")
    warn_above: float = Field(10.0, gt=0, description="warn above this multiple of the task loss")

    @field_validator("weight", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        """One sentence instead of one for each member of the union."""
        if value == "auto":
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError("should be a number of at least 0, or auto")
        return number

    @model_validator(mode="after")
    def _gradients_that_are_measured(self) -> Self:
        if self.auto == "gradient" and self.weight != "auto":
            raise ValueError(
                "auto gradient measures for weight auto, and weight is a number: set weight to auto, or leave auto out"
            )
        if self.auto == "loss" and self.auto_every != type(self).model_fields["auto_every"].default:
            raise ValueError(
                "auto_every belongs to auto gradient, and auto is loss: set auto to gradient, or leave auto_every out"
            )
        return self

    @model_validator(mode="after")
    def _a_decay_that_is_one(self) -> Self:
        if self.decay == "none" and (self.decay_floor > 0 or self.decay_epochs is not None):
            key = "decay_floor" if self.decay_floor > 0 else "decay_epochs"
            raise ValueError(
                f"{key} belongs to a decay, and decay is none: set decay to linear or cosine, or leave {key} out"
            )
        return self

    def check_length(self, epochs: int, name: str) -> None:
        """UserError: in a run of `epochs` the decay of the method `name` never reaches its floor."""
        if self.decay == "none":
            return
        end = epochs if self.stop_epoch is None else min(epochs, self.stop_epoch)
        reached = end if self.decay_epochs is None else self.decay_epochs
        if reached > end:
            raise UserError(
                f"kd.decay_epochs {reached:g} of {name} is after the distillation's end (epoch {end}), so the decay never "
                f"reaches its floor; set it to {end} at most, or leave it out"
            )
        if self.warmup >= reached > 0:
            raise UserError(
                f"kd.warmup {self.warmup:g} of {name} lasts until its decay has ended (epoch {reached:g}), so the factor is "
                "never what kd.weight says; make the warm-up shorter, or leave one of them out"
            )


O = TypeVar("O", bound=DetectorOutput)


class Pair(NamedTuple):
    """Two detectors."""

    student: Detector[Any, Any]
    teacher: Detector[Any, Any]


@dataclass(frozen=True, slots=True)
class Step(Generic[O]):
    """A batch that both have seen; O is what detectors say that the method can distil.

    Attributes:
        student, teacher: their outputs; of the teacher's maps only those that are asked for
        match: who answers for what in the student's own losses
        models: for what the outputs mean (`class_probability`)
        seed: of the run, and number, which counts from 0 over the whole run: what a method draws at random
            follows from these two alone, so that a resumed run draws the same
    """

    student: O
    teacher: O
    batch: Batch
    match: Any
    models: Pair
    seed: int = 0
    number: int = 0

    def maps(self, tap: Tap, level: LevelPair) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's map of a tap at a pair of levels."""
        student, teacher = getattr(self.student, tap)[level.student], getattr(self.teacher, tap)[level.teacher]
        return student, teacher


class Distiller(nn.Module, ABC):
    """A distillation method: compares student and teacher outputs, owns what is trained for that and nothing else.

    Attributes:
        needs: the maps it reads; none: it compares predictions
        terms: the keys that `compare` returns, every time the same; their source is `name`
        counted: whether one of them has a `Loss.count`, or the student's labels come from it; else each is a
            mean over images
        labels: it gives labels for the student's own losses, and has no terms
        batch_statistics: it reads the teacher's maps (`needs`) from a second pass on the statistics of the batch
    """

    Config: ClassVar[type[KDConfig]]
    name: ClassVar[str]

    needs: frozenset[Tap]
    terms: tuple[LossName, ...]
    counted: bool = False
    labels: ClassVar[bool] = False
    batch_statistics: bool = False

    def __init__(self, cfg: KDConfig, pairing: Pairing) -> None:
        super().__init__()
        self.pairing = pairing

    @abstractmethod
    def compare(self, step: Step[Any]) -> Losses:
        """Weighted float32 losses by term."""

    def assigned_from(self, student: Any, teacher: Any) -> Any:
        """What the student's assigner reads, of the outputs of both."""
        return student

    def maps(self, step: Step[Any]) -> dict[str, Tensor]:
        """What the method looks at, for images: {what it is: (B, h, w) weights of a level's cells}."""
        return {}


@dataclass(frozen=True, slots=True)
class Teacher:
    """Whom the student learns from.

    Attributes:
        source: file or name, as the user gave it
        digest: of the weights' file; a resumed run refuses another
        share: share of the detector's parameters that came from the file, 0 to 1
        weight: factor on everything this teacher teaches
    """

    detector: Detector[Any, Any]
    source: str
    digest: str
    share: float
    weight: float = 1.0
