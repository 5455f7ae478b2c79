"""Label assignment distillation: the teacher's predictions decide, in a training step, its parts, and with other methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.kd.fakes import TinyDetector, make_batch, tiny_yolox
from tests.kd.test_across_detectors import detector
from tests.losses import means
from yoloxkd.engine.parallel import gradients
from yoloxkd.engine.step import StudentPass, TrainStep
from yoloxkd.errors import UserError
from yoloxkd.kd.methods.lad import LAD, LADConfig
from yoloxkd.kd.methods.pkd import PKD, PKDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn.assigners.ddod import ddod_matches
from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.assigners.simota import simota
from yoloxkd.types import Batch, Draw


class Watching(TeacherLosses):
    """Keeps the match that the student's losses get."""

    match: Match

    def forward(self, student: StudentPass) -> Any:
        self.match = student.match
        return super().forward(student)


def steps(student: Any, teacher: Any, *, beside: bool = False) -> tuple[TrainStep, Watching]:
    plan = Pairing.between(student, teacher)
    methods: dict[str, Any] = {"lad": LAD(LADConfig(), plan)} | ({"pkd": PKD(PKDConfig(), plan)} if beside else {})
    module = Watching(teacher, methods)
    return TrainStep(student, nn.ModuleDict({"kd": module})), module


def test_the_students_losses_are_those_of_the_teachers_assignment() -> None:
    student, teacher, batch = tiny_yolox(1).eval(), tiny_yolox(2).eval(), make_batch()
    step, module = steps(student, teacher)
    losses = means(step(batch))
    with torch.no_grad():
        theirs = simota(teacher(batch.images), batch.targets)
        own = simota(student(batch.images), batch.targets)
    assert torch.equal(module.match.fg, theirs.fg)
    assert torch.equal(module.match.gt, theirs.gt)
    assert not torch.equal(theirs.fg, own.fg)
    assert module.methods["lad"].loss == 0  # it ran, and has no loss
    expected = means(student.losses(student(batch.images), batch.targets, module.match))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_classes_are_the_teachers_by_name() -> None:
    student, teacher, batch = tiny_yolox(1).eval(), tiny_yolox(2, ("bird", "ship", "cat", "dog")).eval(), make_batch()
    with torch.no_grad():
        out, seen = student(batch.images), teacher(batch.images)
    found = LAD(LADConfig(), Pairing.between(student, teacher)).assigned_from(out, seen)
    assert torch.equal(found.cls_logits, seen.cls_logits[..., [2, 3, 0]])
    assert torch.equal(found.boxes, seen.boxes)


@pytest.mark.parametrize("family", ["fcos", "gfl"])
def test_a_teacher_of_another_family_with_more_levels(family: str) -> None:
    student, teacher = detector("yolox", 1), detector(family, 2, channels=24)
    step, module = steps(student.train(), teacher)
    batch = make_batch(size=96)
    losses = means(step(batch))
    assert module.match.fg.any()
    assert all(value.isfinite() for value in losses.values())
    with torch.no_grad():
        seen = teacher(batch.images)
    found = LAD(LADConfig(), Pairing.between(student, teacher)).assigned_from(student(batch.images), seen)
    assert found.boxes.shape[1] == sum(h * w for h, w in seen.grid.sizes[:3])
    assert torch.equal(found.cls_logits, seen.cls_logits[:, : found.boxes.shape[1]])
    assert found.quality is not None
    assert (found.quality.sigmoid() > 1 - 1e-6).all() == (family == "gfl")


@pytest.mark.parametrize("family", ["ddod", "autoassign"])
def test_ddod_takes_classes_and_boxes_of_a_teacher_with_and_without_objectness(family: str) -> None:
    student, teacher, batch = detector("ddod", 1).train(), detector(family, 2, channels=24), make_batch(size=96)
    step, module = steps(student, teacher)
    losses = means(step(batch))
    with torch.no_grad():
        seen, own = teacher(batch.images), student(batch.images)
        p = seen.cls_logits.sigmoid()
        p = p if family == "ddod" else p * seen.quality.sigmoid().unsqueeze(-1)
        classes, boxes = ddod_matches(own.grid, p.logit(), seen.boxes, batch.targets)
        match = student.assign(own, batch.targets)
    assert torch.equal(module.match.fg, classes.fg)
    assert torch.equal(module.match.box.fg, boxes.fg)  # type: ignore[attr-defined]
    assert not torch.equal(module.match.fg, match.fg)
    assert all(value.isfinite() for value in losses.values())


def test_a_method_that_is_off_leaves_the_labels_to_the_student() -> None:
    student, teacher, batch = tiny_yolox(1).eval(), tiny_yolox(2).eval(), make_batch()
    step, module = steps(student, teacher)
    module.methods["lad"].factor = 0.0
    step(batch)
    with torch.no_grad():
        assert torch.equal(module.match.fg, simota(student(batch.images), batch.targets).fg)


@pytest.mark.parametrize("beside", [False, True])
def test_a_batch_in_parts_counts_the_teachers_positives(beside: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for parts in (1, 2):
        student, teacher = tiny_yolox(1).eval(), tiny_yolox(2).eval()
        step, _ = steps(student, teacher, beside=beside)
        step.double()
        teacher.double()
        batch: Batch = make_batch(images=4)
        pieces = [batch.part(i, parts) for i in range(parts)]
        losses = gradients(step, pieces, Draw(1, 2), lambda loss: loss.backward(), lambda part, terms: terms)
        grads = {n: p.grad for n, p in step.named_parameters() if p.grad is not None}
        found.append({str(n): v for n, v in losses.items()} | grads)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (TinyDetector(4), TinyDetector(6), "this student's assigner asks for neither .*choose a yolox or ddod student"),
        (tiny_yolox(1), TinyDetector(6), "the teacher has none at stride 32"),
        (tiny_yolox(1), tiny_yolox(2, ("cat", "dog", "ship")), "does not know 'bird'"),
    ],
)
def test_what_it_cannot_serve_is_refused_in_one_sentence(student: Any, teacher: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LAD(LADConfig(), Pairing.between(student, teacher))


@pytest.mark.parametrize(
    "keys", [{"weight": 2.0}, {"weight": "auto"}, {"warmup": 1}, {"decay": "linear"}, {"warn_above": 3}]
)
def test_keys_of_a_loss_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="belongs to a loss, and lad gives labels"):
        LADConfig.model_validate(keys)
    assert LADConfig(stop_epoch=3, inherit=True).stop_epoch == 3
