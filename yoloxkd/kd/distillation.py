"""Distillation as a callback of the training loop: pairing, teacher check, loss factors, silent-loss warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from yoloxkd.config.recipe import TeacherSection
from yoloxkd.engine.checkpoint_parts import checked_state
from yoloxkd.engine.device import folds_norms
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.gradients import gradient_rows, trunk
from yoloxkd.engine.optim import warmup_steps
from yoloxkd.errors import GateError, UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller, KDConfig, Teacher
from yoloxkd.kd.inherit import inherit_from
from yoloxkd.kd.pairing import Pairing, divide_classes, table
from yoloxkd.kd.report import distillation_report
from yoloxkd.kd.rescaled_teacher import unwrapped
from yoloxkd.kd.saved_state import SavedDistillation, TeacherRecord
from yoloxkd.kd.teacher_check import check_teacher
from yoloxkd.kd.teacher_losses import TeacherLosses, TeacherMethod
from yoloxkd.kd.weight import MethodWeight
from yoloxkd.nn.folded_norms import fold_norms
from yoloxkd.types import TASK, LossName, Tap
from yoloxkd.viz.html_report import LossHistory, ReportPart

_SECTION = TeacherSection()
CHECK_EVERY = 20
"""Steps between looks at the counters on the device."""


class Distill(Callback):
    """Trains the student beside one or more teachers with one or more methods.

    Every process of a distributed run has its own copies of the teachers, and sums what it watches over all of them.
    Who owns what: a `TeacherLosses` runs a teacher, and has each method's factor in the coming step and its loss in the
    last one; a `MethodWeight` says what that factor is; this callback takes the one to the other, checks, and reports.

    Args:
        teachers: Detectors with their weights in place; with several, every method learns from each of them.
        methods: {name in `DISTILLERS`: its keys}
        min_ap: Refuse a teacher below this AP (0 to 1) in the student's classes that it knows; 0: do not evaluate it.
        gate_images: Validation images that AP is measured on; None: all.
        nominal_size: Side of the training input before multi-scale, px.
    """

    name = "kd"
    everywhere = True

    def __init__(
        self,
        teachers: Teacher | Sequence[Teacher],
        methods: Mapping[str, KDConfig],
        *,
        min_ap: float = _SECTION.min_ap,
        gate_images: int | None = _SECTION.gate_images,
        nominal_size: int | None = None,
    ) -> None:
        for name in methods:
            DISTILLERS.find(name)
        self.teachers = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
        self.methods = dict(methods)
        self.min_ap, self.gate_images, self.nominal_size = min_ap, gate_images, nominal_size
        self.records: list[TeacherRecord] = []
        self.modules: list[TeacherLosses] = []
        self.weights: dict[str, MethodWeight] = {}
        self.silent: set[LossName] = set()  # losses that were zero throughout their last epoch, said once
        self._saved: SavedDistillation | None = None
        self._applied: dict[str, Tensor] = {}  # factors of methods whose gradients are measured in this step

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._saved = checked_state(SavedDistillation, saved, self.name)
        self.records = self._saved.teachers

    def state_dict(self) -> dict[str, Any]:
        counts = [module.nonfinite.counts for module in self.modules]
        return {
            "teachers": [record.model_dump() for record in self.records],
            "auto": {name: weight.state_dict() for name, weight in self.weights.items() if weight.iterations},
            "nonfinite": counts if any(count is not None for count in counts) else [],
        }

    def environment(self, state: State) -> dict[str, Any]:
        return {self.name: self.state_dict()}

    def report(self, state: State, history: LossHistory) -> ReportPart | None:
        if not self.records:  # the run ended before it had its teachers
            return None
        return distillation_report(self.methods, self.records, history)

    def on_setup(self, state: State) -> None:
        for name, cfg in self.methods.items():
            cfg.check_length(state.epochs, name)
        saved = self._saved
        if saved is not None:
            saved.check_teachers(self.teachers, self.methods)
        pairings = divide_classes(
            [Pairing.between(state.detector, t.detector.to(state.device), self.nominal_size) for t in self.teachers]
        )
        methods = [self._methods(pairing) for pairing in pairings]
        self._say_pairings(state, pairings, methods)
        if saved is None:
            self._inherit(state)
            aps = [
                check_teacher(state, teacher, pairing, self.min_ap, self.gate_images)
                for teacher, pairing in zip(self.teachers, pairings, strict=True)
            ]
        else:
            aps = [record.ap for record in saved.teachers]
        self.records = list(map(_record, self.teachers, aps, pairings, methods))
        for number, (teacher, distillers) in enumerate(zip(self.teachers, methods, strict=True), start=1):
            tag = f"@{number}" if len(self.teachers) > 1 else ""
            module = TeacherLosses(teacher.detector, distillers, tag=tag, weight=teacher.weight)
            self.modules.append(module)
            state.aux[f"kd{tag}"] = module
        self._check_compiled(state)
        start = warmup_steps(state.recipe, state.iters_per_epoch)
        self.weights = {
            n: MethodWeight(cfg, state.iters_per_epoch, state.epochs, start) for n, cfg in self.methods.items()
        }
        if saved is not None:
            self._restore(saved, state.device)
        self._saved = None

    def _restore(self, saved: SavedDistillation, device: torch.device) -> None:
        """Measure and count on where another run stopped."""
        for name, weight in saved.auto.items():
            self.weights[name].load_state_dict(dict(weight), device)
        saved.check_counts([len(module.names) for module in self.modules])
        for module, counts in zip(self.modules, saved.nonfinite, strict=False):
            if counts is not None:
                module.nonfinite.restore(counts, device)

    def on_fit_start(self, state: State) -> None:
        """Give the teachers the student's memory format, which the engine has chosen by now, and compile them likewise.

        On a GPU their batch norms are folded into the convolutions before: a pass over each map less.
        """
        kernels = (p for p in state.detector.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
        kernel = next(kernels, None)
        if kernel is not None and kernel.is_contiguous(memory_format=torch.channels_last):
            for teacher in self.teachers:
                teacher.detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if folds_norms(state.device):
            for teacher, module in zip(self.teachers, self.modules, strict=True):
                if not any(method.distiller.batch_statistics for method in module.methods.values()):
                    side = 2 * teacher.detector.size_multiple
                    fold_norms(teacher.detector, torch.zeros(1, 3, side, side, device=state.device))
        if state.recipe.engine.compile:
            for teacher in self.teachers:
                teacher.detector.compile()

    def on_batch_start(self, state: State) -> None:
        self._applied = {}
        for name, weight in self.weights.items():
            factor: float | Tensor = weight.at(state.epoch, state.iteration, state.device)
            if (
                isinstance(factor, Tensor)
                and weight.measures_gradients(state.iteration)
                and not DISTILLERS[name].labels
            ):
                self._applied[name], factor = factor, 1.0  # given to the losses once they are measured
            for method in self._under_teachers(name):
                method.factor = factor

    def on_losses(self, state: State) -> None:
        measuring = [
            (n, weight)
            for n, weight in self.weights.items()
            if weight.measuring and weight.cfg.auto == "loss" and self._runs(n)
        ]
        if measuring:
            task = torch.stack([v.detach().float() for k, v in state.losses.items() if k.source == TASK]).sum()
        for name, weight in measuring:
            loss = torch.stack([method.loss for method in self._under_teachers(name) if method.loss is not None]).sum()
            if weight.observe_part(task, loss / state.parts, state.part, state.parts):
                self._say_fixed(state, name)
        if self._applied:
            self._measure_gradients(state)

    def _measure_gradients(self, state: State) -> None:
        """Take in gradients of a part's losses, which have no factor yet, and give it to them."""
        groups = {name: [n for m in self._under_teachers(name) for n in m.names] for name in self._applied}
        task = torch.stack([v.float() for k, v in state.losses.items() if k.source == TASK]).sum()
        sums = [torch.stack([state.losses[n].float() for n in names]).sum() for names in groups.values()]
        scale = state.scaler.scale(torch.ones((), device=state.device)) if state.scaler else 1.0
        rows = gradient_rows([task, *sums], trunk(state.detector), scale)
        for place, (name, names) in enumerate(groups.items(), start=1):
            factor = self._applied[name]
            state.losses = state.losses | {n: state.losses[n] * factor for n in names}
            if self.weights[name].observe_gradients(torch.stack([rows[0], rows[place]]), state.part, state.parts):
                self._say_fixed(state, name)
        if state.part + 1 == state.parts:
            self._applied = {}

    def _say_fixed(self, state: State, name: str) -> None:
        weight = self.weights[name]
        what, of = ("terms", f"loss of the first {weight.iterations} iterations")
        if weight.cfg.auto == "gradient":
            what, of = (
                "gradient on backbone and neck",
                f"loss's at {weight.needed - weight.before} steps after the warm-up",
            )
        state.say(
            f"{name}: kd.weight is fixed at {weight.fixed:.4g}, which makes its {what} {weight.cfg.auto_share:g} of the task {of}"
        )

    def _check_compiled(self, state: State) -> None:
        if state.recipe.engine.compile and any(cfg.auto == "gradient" for cfg in self.methods.values()):
            raise UserError(
                "kd.auto gradient runs several backward passes on one step, for which a compiled model does not keep its "
                "values; use --set engine.compile=false, or --set kd.auto=loss"
            )

    def on_step(self, state: State) -> None:
        if state.iteration % CHECK_EVERY == 0:
            self._check_finite(state)

    def on_epoch_end(self, state: State) -> None:
        self._check_finite(state)
        task = sum(v for k, v in state.epoch_losses.items() if k.source == TASK)
        running = [name for name in self.methods if self._runs(name)]
        shares = {name: self._check_terms(state, name, task) for name in running}
        everything = math.fsum(state.epoch_losses.values())
        if shares and everything > 0:
            losses = [
                f"{n}: {loss:.4g}, {loss / everything:.1%}" for n, loss in shares.items() if not DISTILLERS[n].labels
            ]
            labels = [n for n in shares if DISTILLERS[n].labels]
            ground = f"labels{f' by {labels[0]}' if labels else ''} {task / everything:.1%}"
            if losses:
                ending = f"; {ground}" if len(shares) > 1 else ""
                state.say(f"{', '.join(losses)} of the loss in epoch {state.epoch + 1}{ending}")
            else:
                state.say(f"{ground} of the loss in epoch {state.epoch + 1}")

    def _under_teachers(self, name: str) -> list[TeacherMethod]:
        """A method under each teacher."""
        return [module.methods[name] for module in self.modules]

    def _runs(self, name: str) -> bool:
        return self._under_teachers(name)[0].runs

    def _methods(self, pairing: Pairing) -> dict[str, Distiller]:
        """Every method for one teacher."""
        methods = {name: DISTILLERS[name](cfg, pairing) for name, cfg in self.methods.items()}
        for name, method in methods.items():
            if not method.terms and not method.labels:
                raise UserError(f"every term of {name} is switched off or has weight 0; leave --kd {name} out instead")
        return methods

    def _say_pairings(
        self, state: State, pairings: Sequence[Pairing], methods: Sequence[Mapping[str, Distiller]]
    ) -> None:
        for number, (teacher, pairing, distillers) in enumerate(zip(self.teachers, pairings, methods, strict=True), 1):
            if len(self.teachers) > 1:
                state.say(f"teacher @{number} of {len(self.teachers)}: {teacher.source}, weight {teacher.weight:g}")
            state.say(table(pairing.describe(_taps(distillers), _adapted(distillers))))

    def _inherit(self, state: State) -> None:
        if not any(cfg.inherit for cfg in self.methods.values()):
            return
        layers = inherit_from(unwrapped(self.teachers[0].detector), state.detector)
        if layers:
            which = "the teacher" if len(self.teachers) == 1 else "teacher @1"
            state.say(f"inherited from {which}: {len(layers)} layers of neck and head: {', '.join(layers)}")
        else:
            state.say("warning: kd.inherit is on, and no layer of the teacher's neck or head has the student's shapes")

    def _check_finite(self, state: State) -> None:
        """Name the losses that were left out since the last look; stop the run when a method had too many."""
        on_device = [module.nonfinite.counts for module in self.modules if module.nonfinite.counts is not None]
        if len(on_device) < len(self.modules):  # no step was done yet
            return
        counts = iter(torch.cat(on_device).tolist())  # one look at the device for all
        total: dict[LossName, int] = {}
        for module in self.modules:
            for place, name in enumerate(module.names):
                total[name] = next(counts)
                if new := total[name] - module.nonfinite.reported[place]:
                    module.nonfinite.reported[place] = total[name]
                    state.say(
                        f"warning: {module.describe(name)} was not finite in {new} step(s) and was left out of them"
                    )
        for method, cfg in self.methods.items():
            of_method = {n: (module, total[n]) for module in self.modules for n in module.methods[method].names}
            number = sum(count for _, count in of_method.values())
            if number > cfg.max_nonfinite:
                worst = max(of_method, key=lambda n: of_method[n][1])
                raise GateError(
                    f"{number} distillation terms of {method} were not finite up to step {state.iteration}, "
                    f"more than kd.max_nonfinite {cfg.max_nonfinite}, most often {of_method[worst][0].describe(worst)}; "
                    "use --amp bf16 or off, or check the teacher's weights"
                )

    def _check_terms(self, state: State, method: str, task: float) -> float:
        """A method's part in the epoch's loss; a warning when a term is missing or zero, or the method overwhelming."""
        cfg = self.methods[method]
        names = [name for module in self.modules for name in module.methods[method].names]
        losses = {n: state.epoch_losses.get(n) for n in names}
        missing = [n for n, v in losses.items() if v is None]
        zero = [n for n, v in losses.items() if v == 0.0]
        if missing:
            state.say(f"warning: {', '.join(map(str, missing))} did not reach the loss in epoch {state.epoch + 1}")
        if new := [n for n in zero if n not in self.silent]:
            state.say(f"warning: {', '.join(map(str, new))} was exactly 0 throughout epoch {state.epoch + 1}")
        self.silent = (self.silent - set(names)) | set(zero)
        loss = math.fsum(v for v in losses.values() if v is not None)
        if loss > cfg.warn_above * task:
            state.say(
                f"warning: {method} is {loss / max(task, 1e-12):.3g} times the task loss in epoch {state.epoch + 1}; "
                "lower its weights, or use --set kd.weight=auto"
            )
        return loss


def _record(teacher: Teacher, ap: float | None, pairing: Pairing, methods: Mapping[str, Distiller]) -> TeacherRecord:
    return TeacherRecord(
        source=teacher.source,
        digest=teacher.digest,
        share=teacher.share,
        weight=teacher.weight,
        ap=ap,
        plan=pairing.as_dict(),
        table=[list(row) for row in pairing.describe(_taps(methods), _adapted(methods))],
    )


def _adapted(methods: Mapping[str, Distiller]) -> list[str]:
    """The methods that adapt every level of the neck by a 3x3 convolution."""
    return [name for name, method in methods.items() if getattr(method, "adapter", "1x1") == "3x3"]


def _taps(methods: Mapping[str, Distiller]) -> list[Tap]:
    """What the methods read of a detector, each once."""
    return list(dict.fromkeys(tap for method in methods.values() for tap in Tap if tap in method.needs))
