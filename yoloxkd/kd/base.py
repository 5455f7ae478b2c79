"""The `Distiller` contract, and the module that runs the teacher and every method on a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from yoloxkd.config.strict import Strict
from yoloxkd.distributed.ranks import all_sum
from yoloxkd.engine.step import AuxiliaryLoss, StudentPass
from yoloxkd.errors import UserError
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, DetectorOutput, Loss, Losses, LossName, RoIOutput, Tap


class KDConfig(Strict):
    """Keys that every distillation method has."""

    weight: float | Literal["auto"] = Field(
        1.0, description="factor on all terms; auto: to auto_share of the task loss"
    )
    auto_share: float = Field(0.5, gt=0, description="with weight auto: the method's terms as a share of the task loss")
    auto_iterations: int = Field(100, ge=1, description="with weight auto: iterations measured, then fixed")
    warmup: float = Field(0.0, ge=0, description="epochs (or part of one) over which the factor grows linearly")
    stop_epoch: int | None = Field(None, ge=0, description="distil the first so many epochs only; None: all")
    decay: Literal["none", "linear", "cosine"] = Field("none", description="how the factor falls to decay_floor")
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

    student, teacher  their outputs; of the teacher's maps only those that are asked for
    match             who answers for what in the student's own losses
    models            for what the outputs mean (`class_probability`)
    seed              of the run, and number, which counts from 0 over the whole run: what a method draws at random
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

    needs    the maps it reads; none: it compares predictions
    terms    the keys that `compare` returns, every time the same; their source is `name`
    counted  whether one of them has a `Loss.count`, or the student's labels come from it; else each is a mean over images
    labels   it gives labels for the student's own losses, and has no terms
    """

    Config: ClassVar[type[KDConfig]]
    name: ClassVar[str]

    needs: frozenset[Tap]
    terms: tuple[LossName, ...]
    counted: bool = False
    labels: ClassVar[bool] = False

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

    source  file or name, as the user gave it
    digest  of the weights' file; a resumed run refuses another
    share   share of the detector's parameters that came from the file, 0 to 1
    weight  factor on everything this teacher teaches
    """

    detector: Detector[Any, Any]
    source: str
    digest: str
    share: float
    weight: float = 1.0


class _Outside:
    """Holds a detector where nn.Module does not look for children; copies of the holder share the detector."""

    def __init__(self, detector: Detector[Any, Any]) -> None:
        self.detector = detector

    def __deepcopy__(self, memo: dict[int, Any]) -> _Outside:
        return self


class TeacherLosses(AuxiliaryLoss):
    """Runs one teacher once a batch and every method on its output.

    The teacher is outside the module tree: not in `state_dict`, not among
    `parameters()`, never in training mode, never with a gradient.

    tag        tells several teachers apart in the losses' sources: "pgd@1", "pgd@2"; empty for a single one
    method_of  {source of its losses: method}
    weight     factor on all terms, for good
    scales     {method: factor} of the coming step, set by the callback; a float, or a scalar tensor that is still
               being measured. 0.0 means off: the teacher is not run for it and its terms are zero
    raw        {method: its loss before the factor of the step}, of the last step, detached
    nonfinite  (terms,) int64 on the device: how often each term of `names` was not finite in a process, and so left out
    """

    def __init__(
        self,
        teacher: Detector[Any, Any],
        distillers: Mapping[str, Distiller],
        *,
        tag: str = "",
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.tag, self.weight = tag, weight
        self._outside = _Outside(teacher.eval().requires_grad_(False))
        self.distillers = nn.ModuleDict(distillers)
        self.scales: dict[str, float | Tensor] = dict.fromkeys(distillers, 1.0)
        self.raw: dict[str, Tensor] = {}
        self.method_of = {f"{name}{tag}": name for name in distillers}
        self.names = tuple(self._tagged(term) for method in distillers.values() for term in method.terms)
        self.counted = any(method.counted for method in distillers.values())
        self.dtypes: dict[tuple[str, int], str] = {}
        self.nonfinite: Tensor | None = None
        self._faulty: Tensor | None = None
        self._prepared: Any = None
        for parameter in self.parameters():
            parameter.register_hook(self._cut)

    @property
    def teacher(self) -> Detector[Any, Any]:
        return self._outside.detector

    def methods(self) -> dict[str, Distiller]:
        return {name: m for name, m in self.distillers.items() if isinstance(m, Distiller)}

    def _tagged(self, term: LossName) -> LossName:
        return term._replace(source=f"{term.source}{self.tag}")

    def forward(self, student: StudentPass) -> Losses:
        batch, device = student.batch, student.batch.images.device
        methods = self.methods()
        running = [name for name in methods if self.runs(name)]
        losses: Losses = {}
        if running:
            seen, models = self._teacher_output(batch), Pair(student.model, self.teacher)
            step = Step(self._guarded(student.out), seen, batch, student.match, models, *student.draw)
        for name, method in methods.items():
            if name in running:
                with torch.autocast(device.type, enabled=False):
                    found = method.compare(step)
                self._note_dtypes(name, method, step)
            else:
                found = _nothing(method, device)
            losses |= {self._tagged(term): found[term] for term in method.terms}
        return self._scaled(self._finite(losses))

    def prepare(self, batch: Batch) -> None:
        """Run the teacher, when a method of the coming step needs it, and keep the maps that are asked for.

        Before the student's forward pass this costs no memory beyond what is kept; `forward` does it else.
        """
        running = [method for name, method in self.methods().items() if self.runs(name)]
        if not running:
            return
        if self.teacher.training:
            self.teacher.eval()
        with torch.no_grad():
            seen = self.teacher(batch.images)
        self._prepared = _with_maps(seen, frozenset[Tap]().union(*(method.needs for method in running)))

    def assigned_from(self, out: Any) -> Any:
        for name, method in self.methods().items():
            if self.runs(name):
                out = method.assigned_from(out, self._prepared)
        return out

    def _teacher_output(self, batch: Batch) -> Any:
        if self._prepared is None:
            self.prepare(batch)
        seen, self._prepared = self._prepared, None
        return seen

    def runs(self, name: str) -> bool:
        """Whether a method takes part in the coming step."""
        scale = self.scales[name]
        return isinstance(scale, Tensor) or scale != 0.0

    def _finite(self, losses: Losses) -> Losses:
        """Leaves terms that are not finite out of this step, and counts them on the device."""
        if not losses:
            return losses
        values = torch.stack([loss.mean().detach().float() for loss in losses.values()])
        bad = ~values.isfinite()
        self._faulty = bad.any()
        count = all_sum(bad.long())
        self.nonfinite = count if self.nonfinite is None else self.nonfinite.to(bad.device) + count
        return {
            name: replace(loss, total=torch.where(b, torch.zeros_like(loss.total), loss.total))
            for (name, loss), b in zip(losses.items(), bad, strict=True)
        }

    def _scaled(self, losses: Losses) -> Losses:
        losses = {name: replace(loss, total=loss.total * self.weight) for name, loss in losses.items()}
        out: Losses = {}
        for source, method in self.method_of.items():
            own = {name: loss for name, loss in losses.items() if name.source == source}
            self.raw[method] = sum((loss.mean().detach() for loss in own.values()), torch.zeros(()))
            scale = self.scales[method] if self.runs(method) else 1.0
            out |= {name: replace(loss, total=loss.total * scale) for name, loss in own.items()}
        return out

    def _guarded(self, value: Any) -> Any:
        """An output behind a gate that stops what a left-out term would still send back: 0 * inf is NaN."""
        if isinstance(value, tuple):
            return tuple(self._guarded(v) for v in value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: self._guarded(getattr(value, f.name)) for f in fields(value)})
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        alias = value.view_as(value)
        alias.register_hook(self._cut)
        return alias

    def _cut(self, gradient: Tensor) -> Tensor:
        if self._faulty is None or (self._faulty.device.type == "cpu" and not self._faulty):
            return gradient  # asking a CUDA tensor would wait for the device
        return torch.where(self._faulty, torch.nan_to_num(gradient, 0.0, 0.0, 0.0), gradient)

    def _note_dtypes(self, name: str, method: Distiller, step: Step[Any]) -> None:
        source = f"{name}{self.tag}"
        if any(key[0] == source for key in self.dtypes):
            return
        if not method.needs:
            ours, theirs = _short(step.student.box_raw), _short(step.teacher.box_raw)
            text = f"student boxes {ours}, teacher boxes {theirs}"
            self.dtypes |= {(source, level.stride): text for level in method.pairing.levels}
            return
        found: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for tap in method.needs:
            for level in method.pairing.levels_of(tap):
                found.setdefault(level.stride, []).append(step.maps(tap, level))
        for stride, maps in found.items():
            ours, theirs = ("/".join(sorted({_short(m) for m in side})) for side in zip(*maps, strict=True))
            self.dtypes[source, stride] = f"student map {ours}, teacher map {theirs}"


def _with_maps(out: Any, taps: frozenset[Tap]) -> Any:
    """An output without the maps that nobody asked for, so that they need not be kept."""
    if isinstance(out, RoIOutput):
        return replace(out, rpn=_with_maps(out.rpn, taps))
    unread = {tap: () for tap in Tap if tap not in taps and tap in out.__dataclass_fields__}
    return replace(out, **unread)


def _short(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _nothing(method: Distiller, device: torch.device) -> Losses:
    """Zero for every term of a method that is off; its parameters stay in the graph, as DDP expects of them."""
    zero = torch.zeros((), device=device)
    touched = [p.sum() * 0.0 for p in method.parameters() if p.requires_grad]
    first = torch.stack(touched).sum() if touched else zero
    return {term: Loss(first if i == 0 else zero) for i, term in enumerate(method.terms)}
