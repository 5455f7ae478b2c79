"""Detectors in two stages teach and learn through their necks; what needs a prediction at every location is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kd.fakes import make_batch
from tests.kd.plain_heads import PLAIN_HEADS
from tests.losses import distilled, means
from tests.nn.fpn import narrow
from tests.nn.solo.test_solo import narrow_solo
from tests.nn.two_stage.contract import narrow_two_stage, with_masks
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller, Pair, Step
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
from yoloxkd.types import TASK, Batch, Draw

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


PAIRS: list[tuple[str, str, set[int]]] = [
    ("cascade", "faster", {4, 8, 16, 32}),
    ("faster", "gfl", {8, 16, 32}),
    ("gfl", "cascade", {8, 16, 32}),
    ("cascade-mask", "mask", {4, 8, 16, 32}),
    ("solo", "solo", {4, 8, 16, 32}),
]
OF_NECKS = ("fgd", "mgd", "cwd", "pkd", "fgfi", "fkd")


@pytest.mark.parametrize(
    ("teacher", "student", "strides", "method"),
    [
        *((*pair, method) for pair in PAIRS for method in ("fgd", "mgd")),
        *(("cascade-mask", "faster", {4, 8, 16, 32}, method) for method in OF_NECKS),
        *(("faster", "gfl", {8, 16, 32}, method) for method in OF_NECKS[2:]),
    ],
)
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


# heads


def sure(kind: str, seed: int, names: list[str] = NAMES) -> FasterRCNN:
    """A detector whose heads differ from region to region, as trained ones do."""
    torch.manual_seed(seed)
    model: FasterRCNN = narrow_two_stage(KINDS[kind], names)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.startswith(("rpn_head", "roi_head")):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def whole(images: int = 2) -> Batch:
    batch = make_batch(images=images, size=96, seed=0)
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    return batch


def step_of(student: Detector[Any, Any], teacher: Detector[Any, Any], batch: Batch) -> Step[Any]:
    out = student(batch.images)
    with torch.no_grad():
        seen = teacher(batch.images)
    match = student.assign(out, batch.targets, Draw(1, 0, batch.place))
    return Step(out, seen, batch, match, Pair(student, teacher))


def made(method: str, step: Step[Any]) -> Distiller:
    torch.manual_seed(0)
    kind = DISTILLERS[method]
    return kind(kind.Config.model_validate(kd_defaults(method, "faster-rcnn")), Pairing.between(*step.models))


def terms_of(method: Distiller, step: Step[Any]) -> dict[str, torch.Tensor]:
    return means({name._replace(source=TASK): loss for name, loss in method.compare(step).items()})


@pytest.fixture(scope="module")
def steps() -> dict[str, Step[Any]]:
    """By the teacher's kind, of a Faster R-CNN, and of one cascade under another."""
    pairs = {"faster": ("faster", "faster"), "cascade": ("faster", "cascade"), "both": ("cascade", "cascade")}
    return {name: step_of(sure(ours, 2), sure(theirs, 1), whole()) for name, (ours, theirs) in pairs.items()}


@pytest.mark.parametrize("pair", ["faster", "cascade", "both"])
@pytest.mark.parametrize("name", PLAIN_HEADS)
def test_heads_equal_their_plain_reading(steps: dict[str, Step[Any]], name: str, pair: str) -> None:
    step = steps[pair]
    assert all(match.fg.any() for match in step.match.stages)
    method = made(name, step)
    terms, plain = terms_of(method, step), PLAIN_HEADS[name](method, step)
    assert set(terms) == {str(term._replace(source=TASK)) for term in method.terms}
    assert plain.keys() <= terms.keys()
    for term, value in plain.items():
        assert value > 0 or term == "head_box", term
        torch.testing.assert_close(terms[term], value, rtol=1e-4, atol=1e-6, msg=term)


@pytest.mark.parametrize("name", [*PLAIN_HEADS, "frs"])
def test_both_stages_of_the_student_learn_and_nothing_of_the_teacher(name: str) -> None:
    step = step_of(sure("faster", 2), sure("faster", 1), whole())
    method = made(name, step)
    terms = terms_of(method, step)
    assert all(value.isfinite() for value in terms.values())
    torch.stack(list(terms.values())).sum().backward()

    def learnt(model: Detector[Any, Any], prefix: str) -> bool:
        return any(
            p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if n.startswith(prefix)
        )

    student, teacher = step.models
    assert learnt(student, "neck")
    assert learnt(student, "roi_head.bbox_head.0.fc_cls") == (name != "frs")
    assert learnt(student, "rpn_head.rpn_cls") == (name in {"gid", "chen", "frs"})
    assert learnt(student, "rpn_head.rpn_reg") == (name in {"gid", "chen"})
    assert not learnt(teacher, "")


@pytest.mark.parametrize("name", ["defeat", "tadf", "mimic", "gid"])
def test_heads_learn_nothing_from_themselves(name: str) -> None:
    """Chen's class term is a cross entropy with weights, whose minimum is elsewhere."""
    model = sure("faster", 1)
    step = step_of(model, model, whole())
    method = made(name, step)
    terms = {term: float(value.detach()) for term, value in terms_of(method, step).items() if "/s" not in term}
    assert terms == pytest.approx(dict.fromkeys(terms, 0), abs=1e-6)


def test_heads_are_compared_class_by_class(steps: dict[str, Step[Any]]) -> None:
    """A teacher that lists its classes in another order, and knows one more, teaches the shared ones alike."""
    step, other = steps["faster"], sure("faster", 1, ["ant", *NAMES[::-1]])
    order = [3, 2, 1, 4]  # of cat, dog, bird and background there
    with torch.no_grad():
        inner = step.models.teacher.state_dict()
        other.load_state_dict({n: v for n, v in inner.items() if "fc_" not in n}, strict=False)
        head, like = other.roi_head.bbox_head[0], step.models.teacher.roi_head.bbox_head[0]
        for kind in ("weight", "bias"):
            head.fc_cls.get_parameter(kind)[order] = like.fc_cls.get_parameter(kind)
            boxes = like.fc_reg.get_parameter(kind).unflatten(0, (-1, 4))
            head.fc_reg.get_parameter(kind).unflatten(0, (-1, 4))[order[:-1]] = boxes
    again = step_of(step.models.student, other, whole())
    for name in ("defeat", "tadf"):
        terms, expected = terms_of(made(name, again), again), terms_of(made(name, step), step)
        for term in expected:
            torch.testing.assert_close(terms[term], expected[term], rtol=1e-4, atol=1e-6, msg=term)


def test_a_head_that_sees_another_size_is_asked_about_the_same_part_of_the_picture() -> None:
    student, inner = sure("faster", 2), sure("faster", 1)
    step = step_of(student, RescaledTeacher(inner, 2.0), whole())
    method = made("defeat", step)
    stage = method.get_submodule("heads").trained(step)[0].predictions  # type: ignore[operator]
    with torch.no_grad():
        twice = inner.roi(step.teacher.features, step.match.boxes[0] * 2)
    torch.testing.assert_close(stage.teacher, twice.cls_logits)
    assert (stage.boxes[1] - stage.regions).abs().mean() < 20


def test_heads_of_a_batch_in_parts_are_those_of_the_batch() -> None:
    student, teacher, batch = sure("faster", 2), sure("faster", 1), whole(4)
    for name in ("defeat", "chen"):
        once = step_of(student, teacher, batch)
        method = made(name, once)
        parts = [terms_of(method, step_of(student, teacher, batch.part(i, 2))) for i in range(2)]
        for term, value in terms_of(method, once).items():
            torch.testing.assert_close((parts[0][term] + parts[1][term]) / 2, value, rtol=1e-4, atol=1e-6, msg=term)


def test_a_dense_teacher_has_no_head_to_ask() -> None:
    step = step_of(sure("faster", 2), detector("gfl", 1).eval(), whole())
    assert all(name.level is not None for name in made("defeat", step).terms)
    with pytest.raises(
        UserError, match="--kd chen compares class scores at every location, and the student gives them to prop"
    ):
        made("chen", step)
