"""Distillation as a callback of the training loop: plan, teacher gate, factors, and watching that nothing is silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from yoloxkd.engine.events import Callback, State
from yoloxkd.errors import GateError, UserError, nearest
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import KDConfig, Teacher, WithTeacher
from yoloxkd.kd.inherit import inherit_from
from yoloxkd.kd.pairing import Pairing, table
from yoloxkd.kd.weight import MethodWeight

CHECK_EVERY = 20
"""Steps between looks at the counters on the device."""


class Distill(Callback):
    """Trains the student beside a teacher with one or more methods.

    teacher       a detector with its weights in place
    methods       {name in `DISTILLERS`: its keys}
    min_ap        refuse a teacher below this AP (0 to 1) in the student's classes; 0: do not evaluate it
    gate_images   validation images that AP is measured on; None: all
    nominal_size  px, side of the training input before multi-scale
    """

    def __init__(
        self,
        teacher: Teacher,
        methods: Mapping[str, KDConfig],
        *,
        min_ap: float = 0.05,
        gate_images: int | None = None,
        nominal_size: int | None = None,
    ) -> None:
        for name in methods:
            if name not in DISTILLERS:
                raise UserError(f"unknown distiller '{name}'; {nearest(name, DISTILLERS)}")
        self.teacher, self.methods = teacher, dict(methods)
        self.min_ap, self.gate_images, self.nominal_size = min_ap, gate_images, nominal_size
        self.weights: dict[str, MethodWeight] = {}
        self.reported: list[int] = []

    def on_setup(self, state: State) -> None:
        saved = self._resumed(state)
        detector = self.teacher.detector.to(state.device)
        self.pairing = Pairing.between(state.detector, detector, self.nominal_size)
        distillers = {name: DISTILLERS[name](cfg, self.pairing) for name, cfg in self.methods.items()}
        for name, method in distillers.items():
            if not method.terms:
                raise UserError(f"every term of {name} is switched off or has weight 0; leave --kd {name} out instead")
        taps = dict.fromkeys(tap for method in distillers.values() for tap in method.needs)
        state.say(table(self.pairing.describe(taps)))
        ap = saved.get("teacher_ap")
        if not saved:
            self._inherit(state)
            ap = self._gate(state)
        self.module = WithTeacher(detector, distillers)
        state.aux["kd"] = self.module
        self.weights = {name: MethodWeight(cfg, state.iters_per_epoch) for name, cfg in self.methods.items()}
        for name, value in saved.get("auto", {}).items():
            self.weights[name].fixed = value
        state.extra["kd"] = {
            "digest": self.teacher.digest,
            "teacher": self.teacher.source,
            "teacher_share": self.teacher.share,
            "teacher_ap": ap,
            "plan": self.pairing.as_dict(),
            "auto": saved.get("auto", {}),
        }

    def on_fit_start(self, state: State) -> None:
        """Give the teacher the student's memory format; the engine has chosen it by now."""
        kernels = (p for p in state.detector.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
        kernel = next(kernels, None)
        if kernel is not None and kernel.is_contiguous(memory_format=torch.channels_last):
            self.teacher.detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def on_batch_start(self, state: State) -> None:
        for name, weight in self.weights.items():
            self.module.scales[name] = weight.at(state.epoch, state.iteration, state.device)

    def on_losses(self, state: State) -> None:
        measuring = [(name, weight) for name, weight in self.weights.items() if weight.measuring]
        if not measuring:
            return
        task = torch.stack([v.detach().float() for k, v in state.losses.items() if "/" not in k]).sum()
        for name, weight in measuring:
            if self.module.runs(name) and weight.observe(task, self.module.raw[name]):
                assert weight.fixed is not None
                state.extra["kd"]["auto"] = state.extra["kd"]["auto"] | {name: weight.fixed}
                state.say(
                    f"{name}: kd.weight is fixed at {weight.fixed:.4g}, which makes its terms "
                    f"{weight.cfg.auto_share:g} of the task loss of the first {weight.seen} iterations"
                )

    def on_step(self, state: State) -> None:
        if state.iteration % CHECK_EVERY == 0:
            self._check_finite(state)

    def on_epoch_end(self, state: State) -> None:
        self._check_finite(state)
        task = sum(v for k, v in state.epoch_losses.items() if "/" not in k)
        for name in self.methods:
            if self.module.runs(name):
                self._report(state, name, task)

    def _resumed(self, state: State) -> dict[str, Any]:
        saved: dict[str, Any] = state.resumed.get("kd", {})
        if saved and saved["digest"] != self.teacher.digest:
            raise UserError(
                f"the teacher {self.teacher.source} is not the file this run began with (its digest is "
                f"{self.teacher.digest[:12]}, and was {saved['digest'][:12]} of {saved['teacher']}); "
                "put the old file back, or start a new run"
            )
        return saved

    def _inherit(self, state: State) -> None:
        if not any(cfg.inherit for cfg in self.methods.values()):
            return
        taken = inherit_from(self.teacher.detector, state.detector)
        if taken:
            state.say(f"inherited from the teacher: {len(taken)} layers of neck and head: {', '.join(taken)}")
        else:
            state.say("warning: kd.inherit is on, and no layer of the teacher's neck or head has the student's shapes")

    def _gate(self, state: State) -> float | None:
        """Evaluate the teacher before anything is learnt from it; its AP, or None when it was not measured."""
        share = f"{self.teacher.share:.1%} of its parameters came from the file"
        who = f"teacher {self.teacher.source}: {share}"
        if self.min_ap <= 0:
            state.say(f"{who}; not evaluated, since teacher.min_ap is 0")
            return None
        if self.pairing.known_classes == 0:
            state.say(f"warning: {who}; it knows none of the student's classes, so its AP cannot be measured")
            return None
        images = "all" if self.gate_images is None else f"at most {self.gate_images}"
        ap = float(state.evaluate(self.teacher.detector, self.gate_images)["AP"])
        state.say(f"{who}; AP {ap:.3f} on {images} validation images")
        if not ap >= self.min_ap:  # a NaN fails too
            raise GateError(
                f"the teacher {self.teacher.source} reaches AP {ap:.3f} on the validation set, below teacher.min_ap "
                f"{self.min_ap:g} ({share}); check its weights and class names, or use --set teacher.min_ap=0 to "
                "train with it all the same"
            )
        return ap

    def _check_finite(self, state: State) -> None:
        """Name the terms that were left out since the last look; stop the run when a method had too many."""
        counts = self.module.nonfinite
        if counts is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = counts.clone()
            torch.distributed.all_reduce(counts)
        now, before = counts.tolist(), self.reported or [0] * len(self.module.names)
        self.reported = now
        for name, count, old in zip(self.module.names, now, before, strict=True):
            if count > old:
                state.say(
                    f"warning: {self._named(name)} was not finite in {count - old} step(s) and was left out of them"
                )
        for method, cfg in self.methods.items():
            own = {n: c for n, c in zip(self.module.names, now, strict=True) if n.startswith(method + "/")}
            if sum(own.values()) > cfg.max_nonfinite:
                worst = max(own, key=lambda n: own[n])
                raise GateError(
                    f"{sum(own.values())} distillation terms of {method} were not finite up to step {state.iteration}, "
                    f"more than kd.max_nonfinite {cfg.max_nonfinite}, most often {self._named(worst)}; "
                    "use --amp bf16 or off, or check the teacher's weights"
                )

    def _named(self, name: str) -> str:
        method, _, rest = name.partition("/")
        term, _, level = rest.rpartition("/")
        return f"{method} term {term} at stride {level[1:]} ({self.module.dtypes.get(f'{method}/{level}', 'not run')})"

    def _report(self, state: State, method: str, task: float) -> None:
        """A method's part in the epoch's loss; a warning when it is missing, zero or overwhelming."""
        cfg = self.methods[method]
        names = [n for n in self.module.names if n.startswith(method + "/")]
        found = {n: state.epoch_losses.get(n) for n in names}
        missing = [n for n, v in found.items() if v is None]
        zero = [n for n, v in found.items() if v == 0.0]
        if missing:
            state.say(f"warning: {', '.join(missing)} did not reach the loss in epoch {state.epoch + 1}")
        if zero:
            state.say(f"warning: {', '.join(zero)} was exactly 0 throughout epoch {state.epoch + 1}")
        own = math.fsum(v for v in found.values() if v is not None)
        everything = math.fsum(state.epoch_losses.values())
        if everything > 0:
            state.say(f"{method}: {own:.4g}, {own / everything:.1%} of the loss in epoch {state.epoch + 1}")
        if own > cfg.warn_above * task:
            state.say(
                f"warning: {method} is {own / max(task, 1e-12):.3g} times the task loss in epoch {state.epoch + 1}; "
                "lower its weights, or use --set kd.weight=auto"
            )
