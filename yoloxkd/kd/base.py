"""What a distillation method is, and the module that runs the teacher and applies every method to a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from yoloxkd.config.strict import Strict
from yoloxkd.engine.step import AuxiliaryLoss
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.detector import DenseDetector
from yoloxkd.ops.ranks import all_sum
from yoloxkd.types import Batch, DenseOutput, Loss, Losses, LossName


class KDConfig(Strict):
    """Keys that every distillation method has."""

    weight: float | Literal["auto"] = Field(
        1.0, description="factor on all terms; auto: to auto_share of the task loss"
    )
    auto_share: float = Field(0.5, gt=0, description="with weight auto: the method's terms as a share of the task loss")
    auto_iterations: int = Field(100, ge=1, description="with weight auto: iterations measured, then fixed")
    warmup: float = Field(0.0, ge=0, description="epochs (or part of one) over which the factor grows linearly")
    stop_epoch: int | None = Field(None, ge=0, description="distil the first so many epochs only; None: all")
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


@dataclass(frozen=True, slots=True)
class Context:
    """What a method may need beyond the two outputs.

    teacher  for what its outputs mean (`class_probability`)
    seed     of the run, and step, which counts from 0 over the whole run: what a method draws at random follows from
             these two alone, so that a resumed run draws the same
    """

    teacher: DenseDetector
    seed: int = 0
    step: int = 0


class Distiller(nn.Module, ABC):
    """A distillation method: compares student and teacher outputs, owns what is trained for that and nothing else.

    needs    the `DenseOutput` taps it reads ("features", "cls_features", "reg_features"); none: it compares boxes
    terms    the keys that `compare` returns, every time the same; their source is `name`
    counted  whether one of them has a `Loss.count`; else each is a mean over images
    """

    Config: ClassVar[type[KDConfig]]
    name: ClassVar[str]

    needs: tuple[str, ...]
    terms: tuple[LossName, ...]
    counted: bool = False

    def __init__(self, cfg: KDConfig, pairing: Pairing) -> None:
        super().__init__()
        self.pairing = pairing

    @abstractmethod
    def compare(self, student: DenseOutput, teacher: DenseOutput, batch: Batch, context: Context) -> Losses:
        """Weighted float32 losses by term."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """Whom the student learns from.

    source  file or name, as the user gave it
    digest  of the weights' file; a resumed run refuses another
    share   share of the detector's parameters that came from the file, 0 to 1
    weight  factor on everything this teacher teaches
    """

    detector: DenseDetector
    source: str
    digest: str
    share: float
    weight: float = 1.0


class _Outside:
    """Holds a detector where nn.Module does not look for children; copies of the holder share the detector."""

    def __init__(self, detector: DenseDetector) -> None:
        self.detector = detector

    def __deepcopy__(self, memo: dict[int, Any]) -> _Outside:
        return self


class WithTeacher(AuxiliaryLoss):
    """Runs one teacher once a batch and every method on its output.

    The teacher is outside the module tree: not in `state_dict`, not among
    `parameters()`, never in training mode, never with a gradient.

    tag        tells several teachers apart in the losses' sources: "pgd@1", "pgd@2"; empty for a single one
    method_of  {source of its losses: method}
    weight     factor on all terms, for good
    scales     {method: factor} of the coming step, set by the callback; a float, or a scalar tensor that is still
               being measured. 0.0 means off: the teacher is not run for it and its terms are zero
    step       the coming step, likewise; for what methods draw at random from it and `seed`
    raw        {method: its loss before the factor of the step}, of the last step, detached
    nonfinite  (terms,) int64 on the device: how often each term of `names` was not finite in a process, and so left out
    """

    def __init__(
        self,
        teacher: DenseDetector,
        distillers: Mapping[str, Distiller],
        *,
        tag: str = "",
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tag, self.weight, self.seed, self.step = tag, weight, seed, 0
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
        self._seen: DenseOutput | None = None
        for parameter in self.parameters():
            parameter.register_hook(self._cut)

    @property
    def teacher(self) -> DenseDetector:
        return self._outside.detector

    def methods(self) -> dict[str, Distiller]:
        return {name: m for name, m in self.distillers.items() if isinstance(m, Distiller)}

    def _tagged(self, term: LossName) -> LossName:
        return term._replace(source=f"{term.source}{self.tag}")

    def forward(self, student: DenseOutput, batch: Batch) -> Losses:
        device = student.points.device
        methods = self.methods()
        running = [name for name in methods if self.runs(name)]
        losses: Losses = {}
        if running:
            seen = self._take(batch)
            student = self._gated(student)
            context = Context(self.teacher, self.seed, self.step)
        for name, method in methods.items():
            if name in running:
                with torch.autocast(device.type, enabled=False):
                    found = method.compare(student, seen, batch, context)
                self._note_dtypes(name, method, student, seen)
            else:
                found = _nothing(method, device)
            losses |= {self._tagged(term): found[term] for term in method.terms}
        return self._scaled(self._finite(losses))

    def look(self, batch: Batch) -> None:
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
        unread = {"features", "cls_features", "reg_features"} - {tap for method in running for tap in method.needs}
        self._seen = replace(seen, **dict.fromkeys(unread, ()))

    def _take(self, batch: Batch) -> DenseOutput:
        if self._seen is None:
            self.look(batch)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def runs(self, name: str) -> bool:
        """Whether a method takes part in the coming step."""
        scale = self.scales[name]
        return isinstance(scale, Tensor) or scale != 0.0

    def _finite(self, losses: Losses) -> Losses:
        """Leaves terms that are not finite out of this step, and counts them on the device."""
        values = torch.stack([loss.total.detach() for loss in losses.values()])
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
            self.raw[method] = torch.stack([loss.mean().detach() for loss in own.values()]).sum()
            scale = self.scales[method] if self.runs(method) else 1.0
            out |= {name: replace(loss, total=loss.total * scale) for name, loss in own.items()}
        return out

    def _gated(self, student: DenseOutput) -> DenseOutput:
        """The student's output behind a gate that stops what a left-out term would still send back: 0 * inf is NaN."""

        def gate(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(gate(v) for v in value)
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            alias = value.view_as(value)
            alias.register_hook(self._cut)
            return alias

        return replace(student, **{f.name: gate(getattr(student, f.name)) for f in fields(student)})

    def _cut(self, gradient: Tensor) -> Tensor:
        if self._faulty is None or (self._faulty.device.type == "cpu" and not self._faulty):
            return gradient  # asking a CUDA tensor would wait for the device
        return torch.where(self._faulty, torch.nan_to_num(gradient, 0.0, 0.0, 0.0), gradient)

    def _note_dtypes(self, name: str, method: Distiller, student: DenseOutput, teacher: DenseOutput) -> None:
        for level in method.pairing.levels:
            key = (f"{name}{self.tag}", level.stride)
            if key in self.dtypes:
                continue
            if not method.needs:
                self.dtypes[key] = f"student boxes {_short(student.box_raw)}, teacher boxes {_short(teacher.box_raw)}"
                continue
            s = {_short(getattr(student, tap)[level.student]) for tap in method.needs}
            t = {_short(getattr(teacher, tap)[level.teacher]) for tap in method.needs}
            self.dtypes[key] = f"student map {'/'.join(sorted(s))}, teacher map {'/'.join(sorted(t))}"


def _short(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _nothing(method: Distiller, device: torch.device) -> Losses:
    """Zero for every term of a method that is off; its parameters stay in the graph, as DDP expects of them."""
    zero = torch.zeros((), device=device)
    touched = [p.sum() * 0.0 for p in method.parameters() if p.requires_grad]
    first = torch.stack(touched).sum() if touched else zero
    return {term: Loss(first if i == 0 else zero) for i, term in enumerate(method.terms)}
