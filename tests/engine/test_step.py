"""One training step: never waits for the device, compiles in one graph, and keeps losses in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.losses import means, task
from tests.nn.fpn import narrow
from yoloxkd.assembly.models import build_detector
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.ops import devices
from yoloxkd.types import TASK, Batch, Targets

# what makes the host wait for a device: reading a number, and shapes that depend on data
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
# (indexing with booleans is told by its arguments)


class Waits(TorchDispatchMode):
    """Collects the operations that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        picks = str(func).startswith(("aten.index.Tensor", "aten.index_put")) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if picks or any(name in str(func) for name in WAITING):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def batch(images: int = 2, size: int = 64) -> Batch:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 30.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False]]).repeat(images, 1)
    mask[-1] = False  # the last image has no box
    labels = torch.tensor([[0, 1, 0]]).repeat(images, 1)
    targets = Targets(boxes.repeat(images, 1, 1), labels, mask, torch.zeros_like(mask))
    pixels = torch.randint(0, 255, (images, 3, size, size), dtype=torch.uint8)
    return Batch(pixels, targets, torch.tensor([[0.0, 0.0, size, size]]).repeat(images, 1))


def step(methods: tuple[str, ...] = (), amp: torch.dtype | None = None) -> TrainStep:
    torch.manual_seed(0)
    student = build_detector({"name": "yolox-nano", "width": 0.125}, ["a", "b"])
    aux = nn.ModuleDict()
    if methods:
        teacher = build_detector({"name": "yolox-nano"}, ["a", "b"])
        pairing = Pairing.between(student, teacher)
        aux["kd"] = TeacherLosses(teacher, {m: DISTILLERS[m](DISTILLERS[m].Config(), pairing) for m in methods})
    student.final_phase(True)
    return TrainStep(student, aux, amp).train()


def family(kind: str) -> tuple[DenseDetector, DenseDetector]:
    """A narrow student of a kind of detector and a wider teacher of the same, untrained."""
    torch.manual_seed(0)
    if kind == "yolox":
        student = build_detector({"name": "yolox-nano", "width": 0.125}, ["a", "b"])
        return student, build_detector({"name": "yolox-nano"}, ["a", "b"])
    return narrow(DETECTORS[kind], ["a", "b"], channels=8), narrow(DETECTORS[kind], ["a", "b"])


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(4)
    with Waits() as waits:
        float(x.sum())
        x[x > 1]
    assert len(waits.found) == 2


@pytest.mark.parametrize("methods", [(), ("fgd", "pgd", "cwd", "mgd")], ids=["plain", "distilled"])
def test_a_step_does_not_wait_for_the_device(methods: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "READ_DEVICES", ())  # the path of every device that can be waited for
    one, data = step(methods), batch()
    one(data)  # grids are built once per size
    with Waits() as waits:
        losses = one(data)
    assert waits.found == []
    assert {"box", "obj", "cls", "l1"} <= {*map(str, losses)}


@pytest.mark.parametrize("kind", ["fcos", "atss", "gfl", "retinanet", "autoassign", "ddod", "reppoints"])
def test_no_family_waits_for_the_device_under_any_method(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "READ_DEVICES", ())
    student, teacher = family(kind)
    plan = Pairing.between(student, teacher)
    methods = [m for m in DISTILLERS if not DISTILLERS[m].labels and (m != "ld" or kind == "gfl")]
    distilled = TeacherLosses(teacher, {m: DISTILLERS[m](DISTILLERS[m].Config(), plan) for m in methods})
    one, data = TrainStep(student, nn.ModuleDict({"kd": distilled})).train(), batch()
    one(data)
    with Waits() as waits:
        losses = one(data)
    assert waits.found == []
    assert {name.source for name in losses} == {TASK, *methods}


@pytest.mark.parametrize("methods", [(), ("fgd", "pgd", "cwd", "mgd")], ids=["plain", "distilled"])
def test_losses_are_float32_and_finite_under_bf16(methods: tuple[str, ...]) -> None:
    losses = means(step(methods, torch.bfloat16)(batch()))
    assert all(v.dtype == torch.float32 and bool(v.isfinite()) for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()


@pytest.mark.slow
def test_network_and_losses_compile_in_one_graph() -> None:
    one, data = step(), batch()
    detector = one.detector.eval()

    def losses(images: torch.Tensor) -> torch.Tensor:
        return torch.stack(list(task(detector, detector(images), data.targets).values()))

    expected = losses(data.images)
    compiled = torch.compile(losses, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(data.images), expected)
