"""Detectors in two stages teach and learn through their necks; what needs a prediction at every location is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kd.fakes import make_batch
from tests.losses import distilled
from tests.nn.fpn import narrow
from tests.nn.solo.test_solo import narrow_solo
from tests.nn.two_stage.contract import narrow_two_stage, with_masks
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn.dense.gfl import GFL
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.solo.solo import SOLO
from yoloxkd.nn.two_stage.cascade_rcnn import CascadeRCNN
from yoloxkd.nn.two_stage.faster_rcnn import FasterRCNN
from yoloxkd.nn.two_stage.mask_rcnn import CascadeMaskRCNN, MaskRCNN
from yoloxkd.types import Batch

NAMES = ["cat", "dog", "bird"]
KINDS: dict[str, Any] = {
    "faster": FasterRCNN, "cascade": CascadeRCNN, "gfl": GFL, "mask": MaskRCNN, "cascade-mask": CascadeMaskRCNN,
    "solo": SOLO,
}  # fmt: skip


def detector(kind: str, seed: int) -> Detector[Any, Any]:
    torch.manual_seed(seed)
    build = {"gfl": narrow, "solo": narrow_solo}.get(kind, narrow_two_stage)
    model: Detector[Any, Any] = build(KINDS[kind], NAMES)
    return model


def images_of(kind: str) -> Batch:
    """A batch, with masks where the student learns them."""
    batch = make_batch(images=2, size=96, seed=0)
    if KINDS[kind] in (MaskRCNN, CascadeMaskRCNN, SOLO):
        with_masks(batch.targets, 96)
    return batch


def distilling(method: str, student: Detector[Any, Any], teacher: Detector[Any, Any]) -> TeacherLosses:
    kind = DISTILLERS[method]
    cfg = kind.Config.model_validate(kd_defaults(method, student.family))
    return TeacherLosses(teacher, {method: kind(cfg, Pairing.between(student, teacher))})


@pytest.mark.parametrize(
    ("teacher", "student", "strides"),
    [
        ("cascade", "faster", {4, 8, 16, 32}),
        ("faster", "gfl", {8, 16, 32}),
        ("gfl", "cascade", {8, 16, 32}),
        ("cascade-mask", "mask", {4, 8, 16, 32}),
        ("solo", "solo", {4, 8, 16, 32}),
    ],
)
@pytest.mark.parametrize("method", ["fgd", "mgd"])
def test_necks_are_distilled(teacher: str, student: str, strides: set[int], method: str) -> None:
    """On the levels that both have; of two stages those with a convolution of their own, as the release of FGD has it."""
    learner = detector(student, 2).train()
    module = distilling(method, learner, detector(teacher, 1))
    terms = distilled(module, learner, images_of(student))
    assert {int(name.rpartition("/s")[2]) for name in terms} == strides
    assert all(value.isfinite() and value >= 0 for value in terms.values())
    torch.stack(list(terms.values())).sum().backward()
    learnt = [p.grad for p in learner.get_submodule("neck").parameters()]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in learnt)


def test_nothing_is_learnt_from_oneself() -> None:
    model = detector("faster", 1).eval()
    terms = distilled(distilling("fgd", model, model), model, make_batch(images=1, size=96, seed=0))
    assert all(value == 0 for name, value in terms.items() if "global" not in name)


@pytest.mark.parametrize(("teacher", "student", "who"), [("faster", "gfl", "teacher"), ("gfl", "faster", "student")])
def test_pgd_refuses_two_stages(teacher: str, student: str, who: str) -> None:
    with pytest.raises(UserError, match=f"second stage of the {who} predicts boxes of proposals"):
        distilling("pgd", detector(student, 2), detector(teacher, 1))


@pytest.mark.parametrize("method", DISTILLERS)
def test_every_method_teaches_solo_or_says_why_not(method: str) -> None:
    """SOLO has maps, and neither boxes nor logits at their locations."""
    learner = detector("solo", 2).train()
    try:
        module = distilling(method, learner, detector("solo", 1))
    except UserError as refused:
        said = str(refused)
    else:
        said = ""
    if said:
        assert "; choose " in said
        return
    terms = distilled(module, learner, images_of("solo"))
    assert terms
    assert all(value.isfinite() for value in terms.values())


def test_pgd_refuses_solo() -> None:
    with pytest.raises(UserError, match="the teacher predicts masks and no boxes"):
        distilling("pgd", detector("gfl", 2), detector("solo", 1))


def test_a_teacher_at_another_scale_speaks_of_the_given_input() -> None:
    """Its boxes are where those of the enlarged image are, divided by the scale."""
    inner = detector("faster", 1).eval()
    images = make_batch(images=1, size=96, seed=0).images
    with torch.no_grad():
        out = RescaledTeacher(inner, 2.0)(images)
        large = inner(torch.nn.functional.interpolate(images.float(), size=(192, 192), mode="bilinear"))
        boxes, scores = inner.candidates(out)
        large_boxes, large_scores = inner.candidates(large)
    assert out.image_size == (96, 96)
    torch.testing.assert_close(out.proposals * 2, large.proposals)
    torch.testing.assert_close(out.rpn.boxes * 2, large.rpn.boxes)
    torch.testing.assert_close(boxes * 2, large_boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, large_scores)
