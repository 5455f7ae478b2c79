"""Cross-head distillation on real heads: where it enters, what it compares, and what it leaves as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kd.fakes import make_batch, tiny_yolox
from tests.kd.test_across_detectors import detector
from tests.losses import means
from tests.nn.fpn import narrow
from yoloxkd.engine.step import StudentPass
from yoloxkd.errors import UserError
from yoloxkd.kd.base import Pair, Step
from yoloxkd.kd.functional.predictions import box_divergence
from yoloxkd.kd.methods.crosskd import CrossKD, CrossKDConfig
from yoloxkd.kd.methods.ld import localization_divergence
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn.dense.gfl import GFL
from yoloxkd.nn.detector import Detector
from yoloxkd.types import TASK, Draw, Tap

SIZE = 96


def step_of(student: Detector[Any, Any], teacher: Detector[Any, Any]) -> Step[Any]:
    batch = make_batch(size=SIZE)
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    out = student(batch.images)
    with torch.no_grad():
        seen = teacher.eval().requires_grad_(False)(batch.images)
    return Step(out, seen, batch, student.assign(out, batch.targets, Draw()), Pair(student, teacher))


def found(method: CrossKD, step: Step[Any]) -> dict[str, Tensor]:
    return means({name._replace(source=TASK): loss for name, loss in method.compare(step).items()})


def test_what_it_calls_the_teachers_head_with_is_the_students_map_after_as_many_blocks() -> None:
    student, teacher = (narrow(GFL, ["cat", "dog", "bird"], stacked_convs=3) for _ in range(2))
    for model in (student, teacher):
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    step = step_of(student, teacher)
    method = CrossKD(CrossKDConfig(position=2, alpha=0.0, beta=1.0), Pairing.between(student, teacher))
    values = found(method, step)
    ends = [teacher.tower(tap, student.tower(tap, step.student.features, 0, 2), 2) for tap in (Tap.CLS, Tap.REG)]
    crossed = teacher.assemble(teacher.predict(*ends), step.teacher.image_size)
    fg = step.match.fg
    assert fg.any()
    divergence = localization_divergence(crossed.box_raw, step.teacher.box_raw, 1.0) * fg / fg.sum()
    for stride in student.spec.strides:
        torch.testing.assert_close(
            values[f"boxes/s{stride}"],
            (divergence * (step.student.grid.point_strides == stride)).sum(),
            rtol=1e-4,
            atol=1e-8,
        )


def test_centerness_is_compared_in_the_foreground() -> None:
    student, teacher = detector("fcos", 1, channels=16), detector("fcos", 2, channels=16)
    step = step_of(student, teacher)
    method = CrossKD(CrossKDConfig(position=1, alpha=0.0, beta=0.0, gamma=1.0), Pairing.between(student, teacher))
    values = found(method, step)
    ends = [teacher.tower(tap, getattr(step.student, tap), 1) for tap in (Tap.CLS, Tap.REG)]
    crossed = teacher.assemble(teacher.predict(*ends), (SIZE, SIZE))
    entropy = F.binary_cross_entropy_with_logits(crossed.quality, step.teacher.quality.sigmoid(), reduction="none")
    fg = step.match.fg
    torch.testing.assert_close(torch.stack(list(values.values())).sum(), (entropy * fg).sum() / fg.sum())


def test_running_statistics_of_the_student_are_taken_once() -> None:
    """At position 2 the student's second block runs again, in training mode."""
    student, teacher = tiny_yolox(1).train(), tiny_yolox(2)
    step = step_of(student, teacher)
    before = {name: buffer.clone() for name, buffer in student.named_buffers()}
    method = CrossKD(CrossKDConfig(position=2), Pairing.between(student, teacher))
    torch.stack(list(found(method, step).values())).sum().backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in student.named_buffers())
    assert all(m.track_running_stats for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    second = student.head.cls_convs[0][1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in second.parameters())


def test_a_term_that_is_left_out_sends_nothing_back_into_the_students_blocks() -> None:
    student, teacher = tiny_yolox(1).train(), tiny_yolox(2)
    with torch.no_grad():
        for predictor in teacher.head.reg_preds:
            predictor.weight.fill_(float("inf"))  # type: ignore[operator, union-attr]
    module = TeacherLosses(teacher, {"crosskd": CrossKD(CrossKDConfig(position=2), Pairing.between(student, teacher))})
    batch = make_batch(size=SIZE)
    out = student(batch.images)
    losses = module(StudentPass(student, out, batch, student.assign(out, batch.targets, Draw()), Draw()))
    assert module.nonfinite is not None
    assert module.nonfinite.counts is not None
    assert module.nonfinite.counts.any()
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_a_teacher_that_sees_another_size() -> None:
    """Crossed and own predictions are compared where the teacher has them, and boxes in the same unit."""
    student = tiny_yolox(1).eval()
    teacher = RescaledTeacher(tiny_yolox(2).eval(), 2.0)
    step = step_of(student, teacher)
    method = CrossKD(CrossKDConfig(position=1), Pairing.between(student, teacher))
    values = found(method, step)
    assert all(value.isfinite() and value > 0 for name, value in values.items() if not name.startswith("boxes"))
    same = replace(step, student=step.teacher, match=method_match(step))
    left = found(method, same)
    boxes, grid = step.teacher.boxes * 2, step.teacher.grid  # px of what the teacher sees
    for stride, part in zip(grid.strides, grid.slices(), strict=True):
        # a box below GIoU's least union, 1e-6 of the squared stride, does not overlap itself wholly
        own = box_divergence(boxes[:, part], boxes[:, part], boxes.new_tensor(stride)).sum() / boxes[..., 0].numel()
        torch.testing.assert_close(left[f"boxes/s{stride}"], own, rtol=1e-4, atol=1e-6)
        assert float(left[f"classes/s{stride}"].detach()) == pytest.approx(0, abs=1e-6)
        assert float(left[f"quality/s{stride}"].detach()) == pytest.approx(0, abs=1e-6)


def method_match(step: Step[Any]) -> Any:
    """Every prediction of the teacher's grid as foreground."""
    everywhere = torch.ones_like(step.teacher.quality, dtype=torch.bool)
    return type(step.match).of(everywhere, everywhere.long() * 0)


def test_what_has_no_towers_is_named() -> None:
    student, teacher = tiny_yolox(1), tiny_yolox(2)
    without = {tap: maps for tap, maps in teacher.spec.channels.items() if tap != Tap.CLS}
    plan = replace(Pairing.between(student, teacher), teacher=replace(teacher.spec, channels=without))
    with pytest.raises(UserError, match="the teacher has no cls maps to distil"):
        CrossKD(CrossKDConfig(), plan)
