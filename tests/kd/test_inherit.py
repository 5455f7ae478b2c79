"""The inheriting strategy takes neck and head where they fit, and nothing that would be wrong."""

from __future__ import annotations

import torch

from tests.kd.fakes import TinyDetector
from yoloxkd.kd.inherit import inherit_from


def pair(student: TinyDetector, teacher: TinyDetector) -> tuple[TinyDetector, TinyDetector]:
    with torch.no_grad():
        for t in [*teacher.parameters(), *(b for b in teacher.buffers() if b.is_floating_point())]:
            t.add_(0.5)
    return student, teacher


def test_neck_and_head_are_taken_and_the_backbone_is_not() -> None:
    student, teacher = pair(TinyDetector(6), TinyDetector(6))
    old = {k: v.clone() for k, v in student.state_dict().items()}
    taken = inherit_from(teacher, student)
    theirs = teacher.state_dict()
    for key, value in student.state_dict().items():
        source = old if key.startswith("backbone.") else theirs
        assert torch.equal(value, source[key]), key
    assert "neck.0.0" in taken
    assert "cls_tower.1.1" in taken
    assert not any(name.startswith("backbone") for name in taken)


def test_class_predictors_need_the_same_names() -> None:
    student, teacher = pair(
        TinyDetector(6, names=["cat", "dog", "bird"]), TinyDetector(6, names=["dog", "cat", "bird"])
    )
    taken = inherit_from(teacher, student)
    assert "cls_pred" not in taken
    assert "reg_pred" in taken


def test_a_norm_comes_only_with_its_convolution() -> None:
    """At another width the predictors of the boxes do not fit, nor does any block; nothing at all is taken."""
    student, teacher = pair(TinyDetector(4), TinyDetector(6))
    assert inherit_from(teacher, student) == []
    student, teacher = pair(TinyDetector(6), TinyDetector(6))
    student.neck[0][0] = torch.nn.Conv2d(6, 6, 1, bias=False)  # same channels, so the norm alone would fit
    taken = inherit_from(teacher, student)
    assert "neck.0.1" not in taken
    assert "neck.1.1" in taken
