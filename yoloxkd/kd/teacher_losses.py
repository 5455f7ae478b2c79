"""The module that runs a teacher and every method on a batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.distributed.ranks import all_sum, world_size
from yoloxkd.engine.step import AuxiliaryLoss, StudentPass
from yoloxkd.kd.base import Distiller, Pair, Step
from yoloxkd.kd.second_pass import batch_statistics
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, Loss, Losses, LossName, RoIOutput, Tap


class _Outside:
    """Holds a detector where nn.Module does not look for children; copies of the holder share the detector."""

    def __init__(self, detector: Detector[Any, Any]) -> None:
        self.detector = detector

    def __deepcopy__(self, memo: dict[int, Any]) -> _Outside:
        return self


@dataclass(eq=False, slots=True)
class TeacherMethod:
    """One method under one teacher, and what belongs to the two.

    Attributes:
        distiller: The method.
        source: Of its losses: "pgd"; with several teachers "pgd@1", "pgd@2".
        factor: On its losses in the coming step: a float, or a scalar tensor that is still being measured. 0.0: it is off.
        loss: The sum of its losses in the last step, before the factor, detached; None before the first.
        precisions: {stride: dtypes of what it compared there}, for messages.
    """

    distiller: Distiller
    source: str
    factor: float | Tensor = 1.0
    loss: Tensor | None = None
    precisions: dict[int | None, str] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether it takes part in the coming step."""
        return isinstance(self.factor, Tensor) or self.factor != 0.0

    @property
    def names(self) -> list[LossName]:
        """Its losses under this teacher."""
        return [term._replace(source=self.source) for term in self.distiller.terms]

    def compare(self, step: Step[Any]) -> Losses:
        """Its losses, in float32, under their names."""
        with torch.autocast(step.batch.images.device.type, enabled=False):
            losses = self.distiller.compare(step)
        if not self.precisions:
            self._note_precisions(step)
        named = {name: losses[term] for name, term in zip(self.names, self.distiller.terms, strict=True)}
        if named and world_size() > 1:  # adapters of terms whose weight is zero are in no loss
            first = self.names[0]
            named[first] = replace(named[first], total=named[first].total + self._touched(step.batch.images.device))
        return named

    def nothing(self, device: torch.device) -> Losses:
        """Zero for every loss, where it is off; its parameters stay in the graph, as DDP expects of them."""
        zero = torch.zeros((), device=device)
        return {name: Loss(self._touched(device) if i == 0 else zero) for i, name in enumerate(self.names)}

    def _touched(self, device: torch.device) -> Tensor:
        """Zero, with all parameters in its graph."""
        touched = [p.sum() * 0.0 for p in self.distiller.parameters() if p.requires_grad]
        return torch.stack(touched).sum() if touched else torch.zeros((), device=device)

    def _note_precisions(self, step: Step[Any]) -> None:
        method = self.distiller
        if not method.needs:
            student, teacher = _short(step.student.box_raw), _short(step.teacher.box_raw)
            text = f"student boxes {student}, teacher boxes {teacher}"
            self.precisions = {level.stride: text for level in method.pairing.levels}
            return
        maps: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for tap in method.needs:
            for level in method.pairing.levels_of(tap):
                maps.setdefault(level.stride, []).append(step.maps(tap, level))
        for stride, pairs in maps.items():
            student, teacher = ("/".join(sorted({_short(m) for m in side})) for side in zip(*pairs, strict=True))
            self.precisions[stride] = f"student map {student}, teacher map {teacher}"


class NonFiniteLosses:
    """Losses that are not finite: left out of their step, with what they would send back, and counted on the device.

    Attributes:
        counts: (losses,) int64: in how many processes and steps each was not finite; None before the first step.
        reported: The counts that the user was told of.
    """

    def __init__(self, losses: int) -> None:
        self.counts: Tensor | None = None
        self.reported = [0] * losses
        self._in_this_step: Tensor | None = None

    def restore(self, counts: Tensor, device: torch.device) -> None:
        """Go on counting where another run, which told the user, stopped."""
        self.counts, self.reported = counts.to(device), counts.tolist()

    def finite_totals(self, losses: Collection[Loss]) -> Tensor:
        """The losses' totals, (losses,), with zero for those that are not finite. At least one loss."""
        bad = ~torch.stack([loss.mean().detach().float() for loss in losses]).isfinite()
        self._in_this_step = bad.any()
        count = all_sum(bad.long())
        self.counts = count if self.counts is None else self.counts.to(bad.device) + count
        return torch.stack([loss.total for loss in losses]).masked_fill(bad, 0.0)

    def cut(self, gradient: Tensor) -> Tensor:
        """The gradient that a loss of this step sends back; finite where one was left out: 0 * inf is NaN."""
        bad = self._in_this_step
        if bad is None or (bad.device.type == "cpu" and not bad):
            return gradient  # asking a CUDA tensor would wait for the device
        return torch.where(bad, torch.nan_to_num(gradient, 0.0, 0.0, 0.0), gradient)


class TeacherLosses(AuxiliaryLoss):
    """Runs one teacher once a batch and every method on its output.

    The teacher is outside the module tree: not in `state_dict`, not among `parameters()`, never in training mode, never
    with a gradient.

    Args:
        teacher: With its weights in place.
        distillers: {method: its instance for this teacher}
        tag: Tells several teachers apart in the losses' sources: "@1", "@2"; empty for a single one.
        weight: Factor on all losses, for good.

    Attributes:
        methods: Each method under this teacher: its factor in the coming step, its loss in the last one.
        nonfinite: How often each loss of `names` was not finite.
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
        self.methods = {name: TeacherMethod(method, f"{name}{tag}") for name, method in distillers.items()}
        self.names = tuple(name for method in self.methods.values() for name in method.names)
        self.counted = any(method.counted for method in distillers.values())
        self.nonfinite = NonFiniteLosses(len(self.names))
        self._teacher_output: Any = None
        self._batch_maps: dict[str, Any] = {}  # the maps of the teacher's pass on batch statistics, by tap
        for method in distillers.values():
            if not method.terms:
                method.requires_grad_(False)  # nothing would ever train its adapters
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._cut)

    @property
    def teacher(self) -> Detector[Any, Any]:
        return self._outside.detector

    def describe(self, name: LossName) -> str:
        """A loss in words, with the precision of what it compared: "pgd term cls_fg at stride 8 (...)"."""
        precisions = next(m.precisions for m in self.methods.values() if m.source == name.source)
        level = "" if name.level is None else f" at stride {name.level}"
        return f"{name.source} term {name.term}{level} ({precisions.get(name.level, 'not run')})"

    def forward(self, student: StudentPass) -> Losses:
        batch = student.batch
        step = self._step(student) if any(method.runs for method in self.methods.values()) else None
        losses: Losses = {}
        for method in self.methods.values():
            if step is not None and method.runs:
                losses |= method.compare(self._read_by(method.distiller, step))
            else:
                losses |= method.nothing(batch.images.device)
        self._batch_maps = {}
        return self._scaled(losses)

    def prepare(self, batch: Batch) -> None:
        """Run the teacher, when a method of the coming step needs it, and keep the maps that are asked for.

        Before the student's forward pass this costs no memory beyond what is kept; `forward` does it else.
        """
        running = [method.distiller for method in self.methods.values() if method.runs]
        if not running:
            return
        if self.teacher.training:
            self.teacher.eval()
        with torch.no_grad():
            out = self.teacher(batch.images)
        self._teacher_output = _with_maps(out, frozenset[Tap]().union(*(method.needs for method in running)))
        taps = {tap for method in running if method.batch_statistics for tap in method.needs}
        if taps:
            with torch.no_grad(), batch_statistics(self.teacher):
                out = self.teacher(batch.images)
            self._batch_maps = {tap: getattr(out, tap) for tap in taps}

    def assigned_from(self, out: Any) -> Any:
        for method in self.methods.values():
            if method.runs:
                out = method.distiller.assigned_from(out, self._teacher_output)
        return out

    def _step(self, student: StudentPass) -> Step[Any]:
        if self._teacher_output is None:
            self.prepare(student.batch)
        out, self._teacher_output = self._teacher_output, None
        models = Pair(student.model, self.teacher)
        return Step(self._guarded(student.out), out, student.batch, student.match, models, *student.draw[:2])

    def _read_by(self, method: Distiller, step: Step[Any]) -> Step[Any]:
        """The step with the teacher's maps that a method reads."""
        if not method.batch_statistics:
            return step
        return replace(step, teacher=replace(step.teacher, **{tap: self._batch_maps[tap] for tap in method.needs}))

    def _scaled(self, losses: Losses) -> Losses:
        """The losses times the teacher's weight and their method's factor; what they were before that is noted.

        All totals at once: on CUDA every operation on a single number costs a launch.
        """
        totals = self.nonfinite.finite_totals([losses[name] for name in self.names]) if losses else torch.zeros(0)
        if self.weight != 1.0:
            totals = totals * self.weight
        out: Losses = {}
        for method, part in zip(
            self.methods.values(), totals.split([len(m.names) for m in self.methods.values()]), strict=True
        ):
            method.loss = _sum_of_means(_with_totals(losses, method.names, part))
            factor = method.factor if method.runs else 1.0
            if isinstance(factor, Tensor) or factor != 1.0:
                part = part * factor
            out |= _with_totals(losses, method.names, part)
        return out

    def _guarded(self, value: Any) -> Any:
        """An output behind a gate that stops what a left-out loss would still send back."""
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
        return self.nonfinite.cut(gradient)


def _with_maps(out: Any, taps: frozenset[Tap]) -> Any:
    """An output without the maps that nobody asked for, so that they need not be kept."""
    if isinstance(out, RoIOutput):
        return replace(out, rpn=_with_maps(out.rpn, taps))
    unread = {tap: () for tap in Tap if tap not in taps and tap in out.__dataclass_fields__}
    return replace(out, **unread)


def _short(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _with_totals(losses: Losses, names: Sequence[LossName], totals: Tensor) -> Losses:
    """The named losses with other totals, (names,)."""
    return {name: replace(losses[name], total=total) for name, total in zip(names, totals.unbind(), strict=True)}


def _sum_of_means(losses: Losses) -> Tensor:
    """Of the losses as if these images were the whole batch, detached."""
    return torch.stack([loss.mean().detach() for loss in losses.values()]).sum() if losses else torch.zeros(())
