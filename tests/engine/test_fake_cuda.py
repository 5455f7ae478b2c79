"""A whole training step on CUDA tensors that hold no numbers: devices, precision, waiting, launches."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.fake_cuda import GPU, NMS, Watch, fake_gpu
from tests.engine.test_step import batch
from tests.nn.fpn import SHALLOW, narrow
from tests.nn.solo.test_solo import narrow_solo
from tests.nn.test_folded_norms import norms
from tests.nn.two_stage.contract import narrow_two_stage, with_masks
from yoloxkd.assembly.recipes import resolve
from yoloxkd.engine.callback_list import CallbackList
from yoloxkd.engine.callbacks.finite import FiniteGuard
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.stepper import Stepper
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Teacher
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.distillation import Distill
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.solo.solo import SOLO
from yoloxkd.types import TASK, Batch, Targets

NAMES = ["a", "b"]
FAMILIES = tuple(name for name, kind in DETECTORS.items() if issubclass(kind, DenseDetector))
PRECISIONS = ("off", "bf16", "fp16")
ONE_SIZE = {"augment.multiscale": 0}
IN_PARTS = {"train.accumulate": 2} | ONE_SIZE
CLIPPED = {"optim.clip_norm": 10.0} | ONE_SIZE
SIZES: dict[str, Any] = {}  # multi-scale, and before it a trial at the largest size
STEPS: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "yolox": (("fgd", "pgd", "lad"), "off", ONE_SIZE),
    "fcos": (("cwd", "mgd"), "bf16", SIZES),
    "gfl": (("ld", "response"), "fp16", CLIPPED),
    "atss": (("fgfi", "gid"), "off", IN_PARTS),
    "retinanet": (("defeat", "fkd"), "bf16", IN_PARTS),
    "autoassign": (("frs", "tadf"), "fp16", IN_PARTS),
    "ddod": (("chen", "mimic"), "off", CLIPPED),
    "reppoints": (("pkd", "crosskd"), "bf16", CLIPPED),
}
"""Every family as student and teacher, every method once: methods, precision, keys of the recipe."""
OTHER_STEPS: dict[str, tuple[tuple[str, ...], str, dict[str, Any], int]] = {
    "cascade-mask-rcnn": (("fgd", "chen"), "fp16", CLIPPED, 4),
    "solo": (("mgd",), "bf16", ONE_SIZE, 0),
}
"""Of detectors that are not dense; and how often NMS is waited for: once an image of student and of teacher."""
UPLOADS = 6
"""Tensors of a batch without masks, which come from pinned memory."""


class SetUpDistill(Distill):
    """Distillation that was set up before the run is: pairing reads class indices, and fake tensors have no numbers."""

    def on_setup(self, state: State) -> None:
        if not self.modules:
            super().on_setup(state)
        else:
            for teacher in self.teachers:
                teacher.detector.to(state.device)


class Run:
    """A training run that begins on the CPU; `set_up` takes it to `GPU`.

    Args:
        student, teacher: Detectors.
        methods: Names of distillers.
        keys: Of the recipe.
        kd: Keys of every method.
    """

    def __init__(
        self,
        student: Detector[Any, Any],
        teacher: Detector[Any, Any] | None,
        methods: tuple[str, ...],
        keys: dict[str, Any],
        kd: dict[str, Any] | None = None,
    ) -> None:
        recipe = resolve(student="yolox-nano", sets={"train.imgsz": 64, "train.batch": 2} | keys)
        callbacks: list[Callback] = [FiniteGuard(1)]
        if teacher is not None:
            parsed = {
                name: DISTILLERS[name].Config.model_validate(
                    kd_defaults(name, student.family)
                    | ({} if DISTILLERS[name].labels else {"weight": "auto"})
                    | (kd or {})
                )
                for name in methods
            }
            callbacks.insert(0, SetUpDistill([Teacher(teacher, "teacher", "", 1.0)], parsed, min_ap=0, nominal_size=64))
        self.teacher = teacher
        self.said: list[str] = []
        self.state = State(
            recipe=recipe,
            detector=student,
            device=torch.device("cpu"),
            out=Path(),
            epochs=10,
            iters_per_epoch=1000,
            say=self.said.append,
            evaluate=lambda model, limit: {},
            val=None,  # type: ignore[arg-type]
            callbacks=CallbackList(callbacks),
            parts=recipe.train.accumulate,
        )
        self.state.callbacks.call(lambda callback: callback.on_setup(self.state))
        self.stepper = Stepper(self.state)

    def set_up(self) -> Run:
        self.state.device = GPU
        self.stepper.set_up()
        self.state.callbacks.call(lambda callback: callback.on_fit_start(self.state))
        self.state.detector.final_phase(True)
        self.state.detector.train()
        return self

    def step(self, data: Batch) -> Watch:
        """One more step; what ran in it alone."""
        data = data.map(lambda x: x.pin_memory())  # as the loader gives it
        with Watch() as watch:
            self.stepper.step(data)
        return watch


def detector(family: str, *, teacher: bool = False) -> Detector[Any, Any]:
    if family == "yolox":
        return YOLOX(YOLOX.Config(depth=0.33, width=0.125 if teacher else 0.0625, depthwise=True), NAMES)
    channels = 16 if teacher else 8
    if family == "solo":
        return narrow_solo(SOLO, NAMES, backbone=SHALLOW, channels=channels)
    if family in OTHER_STEPS:
        return narrow_two_stage(DETECTORS[family], NAMES, backbone=SHALLOW, channels=channels)  # type: ignore[arg-type]
    model: DenseDetector = narrow(DETECTORS[family], NAMES, backbone=SHALLOW, stacked_convs=1, channels=channels)  # type: ignore[arg-type]
    return model


def check(run: Run, watch: Watch, sources: set[str], thinned: int = 0) -> None:
    """The step neither waited nor lost precision, and every weight has a gradient on the GPU.

    A first step makes the constants that later ones find (`yoloxkd.ops.constants`), and may wait for each once. `thinned`:
    how often NMS is waited for.
    """
    first = run.state.iteration == 1
    waits = [place for place in watch.waits if not (first and "ops/constants.py" in place)]
    assert [place for place in waits if not place.startswith(NMS)] == []
    assert len(waits) == thinned
    masks = int(run.state.detector.spec.masks)
    assert (
        len([place for place in watch.uploads if "kd/methods/mgd.py" not in place]) <= UPLOADS + masks
    )  # it draws on the CPU
    assert {name.source for name in run.state.losses} == sources
    for name, value in run.state.losses.items():
        assert (value.dtype, value.device) == (torch.float32, GPU), name
    for name, parameter in run.state.detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.device == GPU, name


def test_the_watch_sees_what_waits() -> None:
    with fake_gpu():
        x = torch.empty(4, 2, device=GPU)
        waiting = {
            "a list": lambda: torch.tensor([1.0, 2.0], device=GPU),
            "list indices": lambda: x[:, [1, 0]],
            "new_tensor": lambda: x.new_tensor([1.0]),
            "item": lambda: x.sum().item(),
            "boolean indices": lambda: x[x > 0],
            "to the host": lambda: x.to("cpu", non_blocking=True),
        }
        for name, does in waiting.items():
            with Watch() as watch, suppress(RuntimeError):  # what depends on numbers raises: there are none
                does()
            assert watch.waits, name
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2)
        with Watch() as watch:
            (x * 2).sum()
        assert (watch.waits, watch.launched) == ([], 2)


def test_a_step() -> None:
    run = Run(detector("fcos"), None, (), {"engine.amp": "bf16"} | CLIPPED)
    with fake_gpu():
        check(run.set_up(), run.step(batch()), {TASK})
        assert run.state.ema is not None
        assert run.state.ema.updates == 1


def test_every_family_and_method_has_a_step() -> None:
    assert set(STEPS) == set(FAMILIES)
    assert {method for methods, *_ in STEPS.values() for method in methods} == set(DISTILLERS)


@pytest.mark.slow
@pytest.mark.parametrize("family", STEPS)
def test_a_step_of_every_family(family: str) -> None:
    methods, amp, keys = STEPS[family]
    run = Run(detector(family), detector(family, teacher=True), methods, {"engine.amp": amp} | keys)
    with fake_gpu():
        check(run.set_up(), run.step(batch()), {TASK, *(m for m in methods if not DISTILLERS[m].labels)})
        assert norms(run.teacher) == []  # they are folded into convolutions
        assert (run.state.scaler is not None) == (amp == "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHER_STEPS)
def test_a_step_of_two_stages_and_of_masks(family: str) -> None:
    methods, amp, keys, thinned = OTHER_STEPS[family]
    student = detector(family)
    run = Run(student, detector(family, teacher=True), methods, {"engine.amp": amp} | keys)
    data = batch()
    if student.spec.masks:
        with_masks(data.targets, 64)
    with fake_gpu():
        check(run.set_up(), run.step(data), {TASK, *methods}, thinned)


@pytest.mark.slow
def test_a_step_of_pgd_with_every_option() -> None:
    """Two steps: of the first one's gradients the weight is measured, in float16 and over parts."""
    options = {"normalize": "image", "channel_scale": "std", "statistics": "batch", "k_share": 0.1, "auto": "gradient"}
    student, teacher = detector("fcos"), detector("fcos", teacher=True)
    run = Run(student, teacher, ("pgd",), {"engine.amp": "fp16"} | IN_PARTS, options)
    with fake_gpu():
        run.set_up()
        for _ in range(2):
            check(run, run.step(batch()), {TASK, "pgd"})
        assert norms(run.teacher)  # the statistics of the batch are asked of them


def large(images: int = 64, size: int = 640, rows: int = 120) -> Batch:
    """A batch of the size that a data-center GPU trains on."""
    mask = torch.ones(images, rows, dtype=torch.bool)
    targets = Targets(torch.zeros(images, rows, 4), torch.zeros(images, rows, dtype=torch.int64), mask, ~mask)
    return Batch(torch.zeros(images, 3, size, size, dtype=torch.uint8), targets, torch.zeros(images, 4))


@pytest.mark.slow
def test_launches_of_a_large_step() -> None:
    """What a method adds to the step and its teacher, at 64 images of 640 px: a kernel is some 5 us of host time."""
    keys = {"engine.amp": "bf16", "train.imgsz": 640, "train.batch": 64} | ONE_SIZE
    launched = {}
    for methods in ((), ("fgd",), ("pgd",)):
        student, teacher = detector("yolox"), detector("yolox", teacher=True)
        run = Run(student, teacher if methods else None, methods, keys)
        with fake_gpu():
            watch = run.set_up().step(large())
            check(run, watch, {TASK, *methods})
            launched[methods] = watch.launched
            if methods:
                with Watch() as alone, torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
                    teacher(torch.zeros(64, 3, 640, 640, device=GPU))
    added = {methods[0]: count - launched[()] - alone.launched for methods, count in launched.items() if methods}
    assert added["fgd"] <= 800, added
    assert added["pgd"] <= 1500, added


def test_a_gradient_on_the_wrong_device_is_seen() -> None:
    class Moves(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return torch.zeros(2)

    with fake_gpu():
        weight = nn.Parameter(torch.empty(2, device=GPU))
        with pytest.raises(AssertionError, match="a gradient on cpu"):
            Moves.apply(weight).sum().backward()
