"""kd-check: what it measures, on detectors of a few thousand weights, and what it concludes, from numbers made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.kd.fakes import TinyDetector, make_batch, make_state
from yoloxkd.engine.gradients import ALL, TASK_LOSS, LossGradient
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd.base import KDConfig, Teacher
from yoloxkd.kd.check.concentration import Concentration
from yoloxkd.kd.check.floor import batch_norm_floor
from yoloxkd.kd.check.measure import StudentMeasured, measure_student
from yoloxkd.kd.check.verdict import find, floor_share, level_shares_of_objects, verdict
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.methods.fgd import FGDConfig
from yoloxkd.kd.methods.pgd import PGDConfig
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.nn.detector import Detector
from yoloxkd.types import Batch, LossName


def prepared(
    cfg: KDConfig, teacher: Detector[Any, Any] | None = None, student: TinyDetector | None = None
) -> tuple[TrainStep, Distill]:
    """A student under a teacher, as a run has them after its set-up."""
    torch.manual_seed(0)
    state, _ = make_state(student or TinyDetector())
    name = {PGDConfig: "pgd", FGDConfig: "fgd"}[type(cfg)]
    distill = Distill(Teacher(teacher or TinyDetector(), "teacher.pt", "a" * 64, 1.0), {name: cfg}, min_ap=0)
    distill.on_setup(state)
    return TrainStep(state.detector, state.aux), distill


BATCHES = [make_batch(seed=seed) for seed in range(2)]


def test_a_student_is_measured_as_a_step_sees_it_and_left_as_it_was() -> None:
    step, distill = prepared(PGDConfig(weight=2.0))
    before = {name: value.clone() for name, value in step.state_dict().items()}
    found = measure_student(step, distill, BATCHES, seed=0, weights="start")
    assert all(torch.equal(value, before[name]) for name, value in step.state_dict().items())
    whole = found.gradients[LossName("pgd", ALL)]
    terms = [one for name, one in found.gradients.items() if name in distill.modules[0].names]
    assert whole.loss == pytest.approx(sum(one.loss for one in terms), rel=1e-5)
    assert whole.norm <= sum(one.norm for one in terms) * (1 + 1e-5)
    assert found.factors == {"pgd": 2.0}
    with torch.no_grad():
        step.train()
        own = [sum(float(v.mean()) for k, v in step(b).items() if k.source == "pgd") for b in BATCHES]
    assert whole.loss == pytest.approx(2.0 * sum(own) / 2, rel=1e-4)
    assert found.loss_share(LossName("pgd", ALL)) + found.loss_share(TASK_LOSS) == pytest.approx(1.0)


@pytest.mark.parametrize(("auto", "size"), [("loss", "loss"), ("gradient", "norm")])
def test_the_automatic_weight_is_what_these_batches_make_of_it(auto: str, size: str) -> None:
    step, distill = prepared(PGDConfig.model_validate({"weight": "auto", "auto": auto, "auto_share": 0.25}))
    found = measure_student(step, distill, BATCHES, seed=0, weights="start")
    pgd, task = found.gradients[LossName("pgd", ALL)], found.gradients[TASK_LOSS]
    assert getattr(pgd, size) == pytest.approx(0.25 * getattr(task, size), rel=1e-5)


def test_the_loss_lies_where_the_maps_differ() -> None:
    """A student with the teacher's weights but for one channel of one level's class tower."""
    teacher = TinyDetector().eval()
    student = TinyDetector()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        student.cls_tower[1][1].bias[2] += 5.0
    step, distill = prepared(PGDConfig(branches=["cls"], delta=0.0), teacher, student)
    for norm in [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.train = lambda mode=True, norm=norm: nn.Module.train(norm, False)  # type: ignore[method-assign, misc]
    found = measure_student(step, distill, BATCHES, seed=0, weights="start")
    by_level = {one.stride: one for one in found.concentration}
    assert by_level[16].share == pytest.approx(1.0)
    assert by_level[16].channel_share == pytest.approx(1.0)  # the largest channel of six
    assert (by_level[16].channels, by_level[16].top_channels) == (6, 1)
    assert by_level[8].share == pytest.approx(0.0)
    assert 0 < by_level[16].cell_share < 1


def of_many_kinds(images: int, seed: int = 1) -> Batch:
    """Images that differ in brightness, so that the statistics of a few are not those of many."""
    batch = make_batch(images=images, seed=seed)
    light = torch.rand(images, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return replace(batch, images=(batch.images * light).to(torch.uint8))


def test_a_perfect_student_pays_for_its_batch_norms_and_less_so_with_more_images() -> None:
    teacher, cfg = TinyDetector(), PGDConfig()
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        teacher.train()(of_many_kinds(64, seed=2).images)  # its running statistics are those of such images
    _, distill = prepared(cfg, teacher)
    few, many = (batch_norm_floor(distill.modules[0], {"pgd": cfg}, [of_many_kinds(n)], 0) for n in (2, 32))
    assert list(few) == list(distill.modules[0].names)
    assert 0 < 3 * sum(many.values()) < sum(few.values())
    assert not teacher.training


def test_a_teacher_without_batch_norms_leaves_no_floor() -> None:
    teacher, cfg = TinyDetector(), PGDConfig()
    for block in [teacher.backbone, *teacher.neck, *teacher.cls_tower, *teacher.reg_tower]:
        block[1] = nn.GroupNorm(2, 6)
    _, distill = prepared(cfg, teacher)
    assert sum(batch_norm_floor(distill.modules[0], {"pgd": cfg}, [make_batch()], 0).values()) == 0.0


def test_the_floor_is_of_the_teacher_s_classes_whatever_the_student_s_are() -> None:
    cfg = PGDConfig()
    names = ["ship", "dog"]  # of cat, dog, bird: one known, as its second class
    _, distill = prepared(cfg, TinyDetector(names=names))
    floor = batch_norm_floor(distill.modules[0], {"pgd": cfg}, [make_batch()], 0)
    assert sum(floor.values()) > 0
    _, scaled = prepared(cfg, RescaledTeacher(TinyDetector(), 2.0))
    assert batch_norm_floor(scaled.modules[0], {"pgd": cfg}, [make_batch()], 0) == {}


def test_objects_belong_to_the_level_of_their_size() -> None:
    batch = make_batch(images=1, boxes=3)
    batch.targets.boxes[0] = torch.tensor([[0, 0, 60, 60], [0, 0, 130, 120], [0, 0, 9, 9]], dtype=torch.float32)
    batch.targets.mask[0], batch.targets.ignore[0] = (
        torch.tensor([True, True, False]),
        torch.tensor([False, False, True]),
    )
    assert level_shares_of_objects([batch], [8, 16, 32]) == {8: 0.5, 16: 0.5, 32: 0.0}


PGD = LossName("pgd", ALL)
MAP = Concentration("pgd", "cls", 8, 1.0, 64, 3, 0.1, 0.05)


def measured(
    share: float = 0.5,
    cosine: float = 0.0,
    levels: tuple[float, float] = (1.0, 1.0),
    boxes: float = 0.5,
    **keys: Any,
) -> StudentMeasured:
    gradients = {TASK_LOSS: LossGradient(10.0, 2.0, 1.0, 1.0), PGD: LossGradient(8.0, 2 * share, share, cosine)}
    gradients |= {
        LossName("pgd", "fg", s): LossGradient(4.0, n, n / 2, 0.0) for s, n in zip((8, 16), levels, strict=True)
    }
    gradients |= {
        LossName("pgd", ALL, s): LossGradient(4.0, n, n / 2, 0.0) for s, n in zip((8, 16), levels, strict=True)
    }
    gradients[LossName("pgd", "reg_fea")] = LossGradient(1.0, 2 * share * boxes, share * boxes, 0.0)
    values: dict[str, Any] = {"weights": "start", "factors": {"pgd": 0.2}, "concentration": [MAP]} | keys
    return StudentMeasured(gradients=gradients, **values)


def found(student: StudentMeasured, floor: float = 0.0, objects: tuple[float, float] = (0.5, 0.5)) -> list[Any]:
    floors = {LossName("pgd", "fg", 8): floor, LossName("pgd", "fg", 16): 0.0}
    return find([student], {"pgd": PGDConfig()}, floors, dict(zip((8, 16), objects, strict=True)), 4)


def test_a_run_that_looks_well_has_no_findings() -> None:
    assert found(measured()) == []
    assert "can be started as it is" in verdict([])


@pytest.mark.parametrize(
    ("student", "keys", "harm", "setting", "words"),
    [
        (measured(share=7.0), {}, True, "kd.weight=0.014", "7 times the task's at the student's start: it drowns"),
        (measured(share=2.0), {}, False, "kd.weight=0.05", "louder than the labels"),
        (measured(share=0.01), {}, False, "kd.weight=10", "next to nothing"),
        (measured(cosine=-0.6), {}, True, "kd.weight=0.02", "against the task's"),
        (measured(levels=(0.1, 0.9)), {"objects": (0.9, 0.1)}, False, "'kd.level_weights=[5, 0.69]'", "90% of the gradient"),
        (measured(concentration=[MAP, Concentration("pgd", "cls", 32, 2.0, 64, 3, 0.7, 0.1)]), {}, False, "kd.tau=2.4", "3 of 64"),
        (measured(boxes=0.01), {}, False, "kd.gamma=1.9", "box towers make 1.0% of the gradient"),
        (measured(), {"floor": 8.0}, False, "train.batch=16", "would pay 20%"),
        (measured(), {"floor": 30.0}, False, "train.batch=16", "would pay 75%"),
    ],
)  # fmt: skip
def test_what_stands_out_is_said_with_the_setting_that_helps(
    student: StudentMeasured, keys: dict[str, Any], harm: bool, setting: str, words: str
) -> None:
    (one,) = found(student, **keys)
    assert (one.harm, one.setting) == (harm, setting)
    assert words in one.what
    assert verdict([one]).startswith("Distilling as set would do harm" if harm else "Distilling as set does no harm")


def test_harm_comes_first_and_the_floor_is_a_share_of_what_the_student_pays() -> None:
    both = found(measured(share=2.0), floor=30.0)
    assert [one.harm for one in both] == [True, False]
    assert floor_share({LossName("pgd", "fg", 8): 20.0}, measured(), "pgd") == 0.5
