"""Losses, gradients and assignments of a GPU are those of the CPU, for every family and method."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cuda.gpu import DEVICE, full_float32, on_gpu
from tests.engine.test_step import batch, family
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.types import Draw, Losses

pytestmark = on_gpu
FAMILIES = ("yolox", "fcos", "atss", "gfl", "retinanet", "autoassign", "ddod", "reppoints")
METHODS = [name for name in DISTILLERS if not DISTILLERS[name].labels]


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    full_float32()
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def moved(value: Any) -> Any:
    """An output, a match or targets with every tensor on the device."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(moved(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
    return value


def steps(kind: str, methods: list[str]) -> tuple[TrainStep, TrainStep]:
    """The same untrained student and teacher on the CPU and on the device; norms keep their statistics."""
    student, teacher = family(kind)
    for parameter in student.parameters():  # an untrained head says the same of everything
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    torch.manual_seed(1)
    plan = Pairing.between(student, teacher)
    distillers = {m: DISTILLERS[m](DISTILLERS[m].Config(), plan) for m in methods}
    pair = []
    for device in ("cpu", DEVICE):
        own, other = copy.deepcopy(student).to(device), copy.deepcopy(teacher).to(device)
        aux = TeacherLosses(other, copy.deepcopy(distillers)).to(device)
        step = TrainStep(own, nn.ModuleDict({"kd": aux} if methods else {})).to(device).eval()
        step.detector.final_phase(True)
        pair.append(step)
    return pair[0], pair[1]


def total(losses: Losses) -> Tensor:
    return torch.stack([loss.mean() for loss in losses.values()]).sum()


def compare(kind: str, methods: list[str]) -> None:
    cpu, gpu = steps(kind, methods)
    data = batch(images=3, size=96)
    ours, theirs = gpu(data.to(DEVICE), Draw(3, 7)), cpu(data, Draw(3, 7))
    assert ours.keys() == theirs.keys()
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name].mean().cpu(), loss.mean(), rtol=1e-3, atol=1e-5, msg=str(name))
    total(ours).backward()
    total(theirs).backward()
    gradients = dict(gpu.named_parameters())
    for name, parameter in cpu.named_parameters():
        if parameter.grad is None:
            assert gradients[name].grad is None, name
            continue
        found = gradients[name].grad
        assert found is not None, name
        apart = (found.cpu() - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert apart < 1e-2, (name, float(apart))


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_and_gradients_of_a_family(kind: str) -> None:
    compare(kind, [])


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_of_a_method(method: str) -> None:
    compare("gfl" if method == "ld" else "yolox", [method])


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_method_under_a_family(kind: str) -> None:
    compare(kind, [m for m in METHODS if m != "ld" or kind == "gfl"])


@pytest.mark.parametrize("kind", FAMILIES)
def test_assignments_are_equal(kind: str) -> None:
    """From the CPU's own predictions, so that the assigner alone is compared."""
    cpu, gpu = steps(kind, [])
    data = batch(images=3, size=96)
    with torch.no_grad():
        out = cpu.detector(data.images)
    expected = cpu.detector.assign(out, data.targets, Draw(3, 7))
    found = gpu.detector.assign(moved(out), moved(data.targets), Draw(3, 7))
    assert expected.fg.any()
    for name in ("fg", "gt", "ignored"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    if expected.score is not None:
        torch.testing.assert_close(found.score.cpu(), expected.score, rtol=1e-4, atol=1e-6)
