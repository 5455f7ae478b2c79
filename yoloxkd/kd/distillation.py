"""Distillation as a callback of the training loop: pairing, teacher check, loss factors, silent-loss warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from yoloxkd.config.recipe import TeacherSection
from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import GateError, UserError, nearest
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller, KDConfig, Teacher, TeacherLosses
from yoloxkd.kd.inherit import inherit_from
from yoloxkd.kd.pairing import Pairing, divide_classes, table
from yoloxkd.kd.rescaled_teacher import unwrapped
from yoloxkd.kd.resume_check import check_counts, check_teachers
from yoloxkd.kd.teacher_check import check_teacher
from yoloxkd.kd.weight import MethodWeight
from yoloxkd.types import TASK, LossName, Tap

_SECTION = TeacherSection()
CHECK_EVERY = 20
"""Steps between looks at the counters on the device."""


class Distill(Callback):
    """Trains the student beside one or more teachers with one or more methods.

    Every process of a distributed run has its own copies of the teachers, and sums what it watches over all of them.

    teachers      detectors with their weights in place; with several, every method learns from each of them
    methods       {name in `DISTILLERS`: its keys}
    min_ap        refuse a teacher below this AP (0 to 1) in the student's classes that it knows; 0: do not evaluate it
    gate_images   validation images that AP is measured on; None: all
    nominal_size  px, side of the training input before multi-scale
    """

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
            if name not in DISTILLERS:
                raise UserError(f"unknown distiller '{name}'; {nearest(name, DISTILLERS)}")
        self.teachers = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
        self.methods = dict(methods)
        self.min_ap, self.gate_images, self.nominal_size = min_ap, gate_images, nominal_size
        self.plans: list[Pairing] = []
        self.modules: list[TeacherLosses] = []
        self.weights: dict[str, MethodWeight] = {}
        self.reported: list[int] = []
        self.measured: dict[str, torch.Tensor] = {}  # task loss and own, of the parts of this step so far
        self.silent: set[LossName] = set()  # terms that were zero throughout their last epoch, said once

    @property
    def names(self) -> list[LossName]:
        """Every term of every method and teacher, as the modules return them."""
        return [name for module in self.modules for name in module.names]

    @property
    def method_of(self) -> dict[str, str]:
        """{source of a loss: its method}"""
        return {source: method for module in self.modules for source, method in module.method_of.items()}

    def on_setup(self, state: State) -> None:
        saved = self._resumed(state)
        found = [Pairing.between(state.detector, t.detector.to(state.device), self.nominal_size) for t in self.teachers]
        self.plans = divide_classes(found)
        methods = [self._methods(plan) for plan in self.plans]
        self._say_plans(state, methods)
        aps = [teacher["ap"] for teacher in saved.get("teachers", [])]
        if not saved:
            self._inherit(state)
            aps = [
                check_teacher(state, teacher, plan, self.min_ap, self.gate_images)
                for teacher, plan in zip(self.teachers, self.plans, strict=True)
            ]
        for i, (teacher, own) in enumerate(zip(self.teachers, methods, strict=True)):
            tag = f"@{i + 1}" if len(self.teachers) > 1 else ""
            module = TeacherLosses(teacher.detector, own, tag=tag, weight=teacher.weight)
            self.modules.append(module)
            state.aux[f"kd{tag}"] = module
        self.weights = {name: MethodWeight(cfg, state.iters_per_epoch) for name, cfg in self.methods.items()}
        for name, value in saved.get("auto", {}).items():
            self.weights[name].load_state_dict(value, state.device)
        state.extra["kd"] = {
            "teachers": [
                {"source": t.source, "digest": t.digest, "share": t.share, "weight": t.weight, "ap": ap}
                | {"plan": plan.as_dict(), "table": [list(row) for row in plan.describe(_taps(own))]}
                for t, ap, plan, own in zip(self.teachers, aps, self.plans, methods, strict=True)
            ],
            "auto": dict(saved.get("auto", {})),
            "nonfinite": saved.get("nonfinite", []),
        }
        check_counts(saved, [len(module.names) for module in self.modules])
        for module, counts in zip(self.modules, saved.get("nonfinite", []), strict=False):
            if counts is not None:
                module.nonfinite = counts.to(state.device)
            self.reported += [0] * len(module.names) if counts is None else counts.tolist()

    def on_fit_start(self, state: State) -> None:
        """Give the teachers the student's memory format, which the engine has chosen by now, and compile them likewise."""
        kernels = (p for p in state.detector.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
        kernel = next(kernels, None)
        if kernel is not None and kernel.is_contiguous(memory_format=torch.channels_last):
            for teacher in self.teachers:
                teacher.detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if state.recipe.engine.compile:
            for teacher in self.teachers:
                teacher.detector.compile()

    def on_batch_start(self, state: State) -> None:
        for name, weight in self.weights.items():
            scale = weight.at(state.epoch, state.iteration, state.device)
            for module in self.modules:
                module.scales[name] = scale

    def on_losses(self, state: State) -> None:
        measuring = [(name, weight) for name, weight in self.weights.items() if weight.measuring]
        if not measuring:
            return
        task = torch.stack([v.detach().float() for k, v in state.losses.items() if k.source == TASK]).sum()
        own = {name: torch.stack([module.raw[name] for module in self.modules]).sum() for name in self.methods}
        if state.part == 0:
            self.measured = {}
        for name, weight in measuring:
            if not self._runs(name):
                continue
            seen = torch.stack([task, own[name] / state.parts])
            self.measured[name] = self.measured[name] + seen if name in self.measured else seen
            if state.part + 1 < state.parts:
                continue
            if weight.observe(*self.measured[name].unbind()):
                state.say(
                    f"{name}: kd.weight is fixed at {weight.fixed:.4g}, which makes its terms "
                    f"{weight.cfg.auto_share:g} of the task loss of the first {weight.seen} iterations"
                )
            state.extra["kd"]["auto"][name] = weight.state_dict()

    def on_step(self, state: State) -> None:
        state.extra["kd"]["nonfinite"] = [module.nonfinite for module in self.modules]
        if state.iteration % CHECK_EVERY == 0:
            self._check_finite(state)

    def on_epoch_end(self, state: State) -> None:
        self._check_finite(state)
        task = sum(v for k, v in state.epoch_losses.items() if k.source == TASK)
        for name in self.methods:
            if self._runs(name):
                self._report(state, name, task)

    def _runs(self, name: str) -> bool:
        return self.modules[0].runs(name)

    def _methods(self, plan: Pairing) -> dict[str, Distiller]:
        """Every method for one teacher."""
        methods = {name: DISTILLERS[name](cfg, plan) for name, cfg in self.methods.items()}
        for name, method in methods.items():
            if not method.terms:
                raise UserError(f"every term of {name} is switched off or has weight 0; leave --kd {name} out instead")
        return methods

    def _say_plans(self, state: State, methods: Sequence[Mapping[str, Distiller]]) -> None:
        for i, (teacher, plan, own) in enumerate(zip(self.teachers, self.plans, methods, strict=True)):
            if len(self.teachers) > 1:
                state.say(f"teacher @{i + 1} of {len(self.teachers)}: {teacher.source}, weight {teacher.weight:g}")
            state.say(table(plan.describe(_taps(own))))

    def _resumed(self, state: State) -> dict[str, Any]:
        saved: dict[str, Any] = state.resumed.get("kd") or {}
        if not saved:
            return saved
        check_teachers(saved, [teacher.source for teacher in self.teachers], self.methods)
        for teacher, old in zip(self.teachers, saved["teachers"], strict=True):
            if old["digest"] != teacher.digest:
                raise UserError(
                    f"the teacher {teacher.source} is not the file this run began with (its digest is "
                    f"{teacher.digest[:12]}, and was {old['digest'][:12]} of {old['source']}); "
                    "put the old file back, or start a new run"
                )
        return saved

    def _inherit(self, state: State) -> None:
        if not any(cfg.inherit for cfg in self.methods.values()):
            return
        taken = inherit_from(unwrapped(self.teachers[0].detector), state.detector)
        if taken:
            which = "the teacher" if len(self.teachers) == 1 else "teacher @1"
            state.say(f"inherited from {which}: {len(taken)} layers of neck and head: {', '.join(taken)}")
        else:
            state.say("warning: kd.inherit is on, and no layer of the teacher's neck or head has the student's shapes")

    def _check_finite(self, state: State) -> None:
        """Name the terms that were left out since the last look; stop the run when a method had too many."""
        found = [module.nonfinite for module in self.modules if module.nonfinite is not None]
        if len(found) < len(self.modules):  # no step was done yet
            return
        now, before = torch.cat(found).tolist(), self.reported or [0] * len(self.names)
        self.reported = now
        for name, count, old in zip(self.names, now, before, strict=True):
            if count > old:
                state.say(
                    f"warning: {self._named(name)} was not finite in {count - old} step(s) and was left out of them"
                )
        for method, cfg in self.methods.items():
            own = {n: c for n, c in zip(self.names, now, strict=True) if self.method_of[n.source] == method}
            if sum(own.values()) > cfg.max_nonfinite:
                worst = max(own, key=lambda n: own[n])
                raise GateError(
                    f"{sum(own.values())} distillation terms of {method} were not finite up to step {state.iteration}, "
                    f"more than kd.max_nonfinite {cfg.max_nonfinite}, most often {self._named(worst)}; "
                    "use --amp bf16 or off, or check the teacher's weights"
                )

    def _named(self, name: LossName) -> str:
        dtypes = [
            text for module in self.modules for key, text in module.dtypes.items() if key == (name.source, name.level)
        ]
        level = "" if name.level is None else f" at stride {name.level}"
        return f"{name.source} term {name.term}{level} ({dtypes[0] if dtypes else 'not run'})"

    def _report(self, state: State, method: str, task: float) -> None:
        """A method's part in the epoch's loss; a warning when it is missing, zero or overwhelming."""
        cfg = self.methods[method]
        names = [n for n in self.names if self.method_of[n.source] == method]
        found = {n: state.epoch_losses.get(n) for n in names}
        missing = [n for n, v in found.items() if v is None]
        zero = [n for n, v in found.items() if v == 0.0]
        if missing:
            state.say(f"warning: {', '.join(map(str, missing))} did not reach the loss in epoch {state.epoch + 1}")
        if new := [n for n in zero if n not in self.silent]:
            state.say(f"warning: {', '.join(map(str, new))} was exactly 0 throughout epoch {state.epoch + 1}")
        self.silent = (self.silent - set(names)) | set(zero)
        own = math.fsum(v for v in found.values() if v is not None)
        everything = math.fsum(state.epoch_losses.values())
        if everything > 0:
            state.say(f"{method}: {own:.4g}, {own / everything:.1%} of the loss in epoch {state.epoch + 1}")
        if own > cfg.warn_above * task:
            state.say(
                f"warning: {method} is {own / max(task, 1e-12):.3g} times the task loss in epoch {state.epoch + 1}; "
                "lower its weights, or use --set kd.weight=auto"
            )


def _taps(methods: Mapping[str, Distiller]) -> list[Tap]:
    """What the methods read of a detector, each once."""
    return list(dict.fromkeys(tap for method in methods.values() for tap in Tap if tap in method.needs))
