"""The methods that FGD and PGD compare with: what their keys do, several teachers, and pairs that they cannot serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms, roi_align

from tests.kd.contract import leaves
from tests.kd.fakes import TinyDetector, make_batch, make_state
from tests.losses import compared, step_of
from tests.nn.fpn import narrow
from tests.test_extension import TwoAnchors
from yoloxkd.assembly.recipes import resolve
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller, Pair, Step, Teacher
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.functional import masks
from yoloxkd.kd.functional.divergence import class_divergence
from yoloxkd.kd.functional.masks import CELL_BUDGET, anchors_near_boxes, box_levels
from yoloxkd.kd.functional.regions import best_boxes, pooled_regions, region_levels
from yoloxkd.kd.methods.chen import bounded_error
from yoloxkd.kd.pairing import Pairing, divide_classes
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.nn.dense.yolox import YOLOX
from yoloxkd.types import Batch, DenseOutput

SERVED_ON_DENSE = ("gid", "frs", "chen")


def method(name: str, pairing: Pairing, **keys: Any) -> Distiller:
    torch.manual_seed(0)
    return DISTILLERS[name](DISTILLERS[name].Config.model_validate(keys), pairing)


def one_object(box: tuple[float, float, float, float]) -> Batch:
    batch = make_batch(1, boxes=1)
    batch.targets.boxes[0, 0] = torch.tensor(box)
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    return batch


def seen(models: Pair, batch: Batch) -> Step[DenseOutput]:
    with torch.no_grad():
        student, teacher = (model.eval()(batch.images) for model in models)
    return replace(step_of(leaves(student), teacher, batch, models.student), models=models)


# regions


def test_suppression_in_slots_is_the_greedy_one() -> None:
    torch.manual_seed(0)
    low = torch.rand(3, 200, 2) * 80
    boxes = torch.cat([low, low + 4 + torch.rand(3, 200, 2) * 40], -1)
    scores = torch.rand(3, 200)
    index, used = best_boxes(boxes, scores, 12, 0.3, 10.0)
    for b in range(3):
        large = ((boxes[b, :, 2:] - boxes[b, :, :2]) > 10).all(1)
        rows = large.nonzero().flatten()
        expected = rows[nms(boxes[b, rows], scores[b, rows], 0.3)][:12]
        assert index[b][used[b]].tolist() == expected.tolist()
    _, used = best_boxes(boxes[:, :2], scores[:, :2].fill_(-torch.inf), 3, 0.3, 0.0)
    assert not used.any()


def test_pooled_regions_are_torchvisions() -> None:
    torch.manual_seed(0)
    strides = (8, 16, 32)
    maps = [torch.randn(2, 3, 256 // s, 192 // s, dtype=torch.float64) for s in strides]
    low = torch.rand(2, 9, 2, dtype=torch.float64) * 200 - 20
    boxes = torch.cat([low, low + torch.rand(2, 9, 2, dtype=torch.float64) * 300], -1)
    level = torch.randint(0, 3, (2, 9))
    used = torch.rand(2, 9) < 0.8
    found = pooled_regions(maps, [(float(s), float(s)) for s in strides], boxes, level, used, bins=7)
    for b in range(2):
        for k in range(9):
            i = int(level[b, k])
            region = [boxes[b, k][None]]
            wanted = roi_align(maps[i][b : b + 1], region, 7, 1 / strides[i], 2, aligned=True)[0].flatten(1).T
            torch.testing.assert_close(found[b, k], wanted * used[b, k])


def test_a_region_belongs_to_the_level_of_its_size() -> None:
    boxes = torch.tensor([[0.0, 0, s, s] for s in (10, 111, 113, 223, 225, 447, 449, 4000)])
    assert region_levels(boxes, (8, 16, 32, 64)).tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    assert region_levels(boxes, (8, 32)).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


# masks


def test_more_boxes_than_the_budget_are_taken_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(2, boxes=30)
    grid = torch.rand(50, 2) * 60
    anchors = torch.cat([grid, grid + 20], 1)
    args = (anchors, batch.targets.boxes, batch.targets.mask, 0.5)
    once = anchors_near_boxes(*args)
    assert CELL_BUDGET["cpu"] > 100
    monkeypatch.setattr(masks, "CELL_BUDGET", {"other": 100})
    assert torch.equal(anchors_near_boxes(*args), once)
    assert once.any()
    assert not once.all()


def test_an_anchor_at_exactly_the_threshold_is_not_near() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 6]])
    box, row = torch.tensor([[[0.0, 0, 10, 10]]]), torch.ones(1, 1, dtype=torch.bool)
    assert anchors_near_boxes(anchors, box, row, 0.5).tolist() == [[True, False, True]]


def test_an_object_has_one_level_by_its_size() -> None:
    boxes = torch.tensor([[0.0, 0, s, s] for s in (5, 110, 112, 222, 224, 900)])
    assert box_levels(boxes, 3, 112.0).tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize(("scope", "levels"), [("all", {8}), ("each", {8, 16}), ("size", {8})])
def test_fgfi_seeks_an_objects_anchor_where_scope_says(scope: str, levels: set[int]) -> None:
    """An object of 40 px fits the anchors of stride 8 (64 px) alone, not those of stride 16 (128 px)."""
    models, batch = Pair(TinyDetector(4), TinyDetector(4)), one_object((10.0, 10, 50, 50))
    maps = method("fgfi", Pairing.between(*models), scope=scope).maps(seen(models, batch))
    assert {int(name.rpartition(" ")[2]) for name, value in maps.items() if value.any()} == levels


def test_defeat_marks_an_object_on_the_level_of_its_size_or_on_all() -> None:
    models, batch = Pair(TinyDetector(4), TinyDetector(4)), one_object((8.0, 16, 40, 48))
    step = seen(models, batch)
    by_size = method("defeat", Pairing.between(*models), assign="size").maps(step)
    everywhere = method("defeat", Pairing.between(*models), assign="all").maps(step)
    assert by_size["foreground, stride 8"].sum() == 4 * 4
    assert by_size["foreground, stride 16"].sum() == 0
    assert everywhere["foreground, stride 16"].nonzero()[:, 1:].tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert torch.equal(everywhere["background, stride 8"], 1 - everywhere["foreground, stride 8"])


def test_objects_of_another_teacher_are_neither_in_nor_around_objects() -> None:
    student = TinyDetector(4, names=("cat", "dog"))
    teachers = [TinyDetector(4, names=(name,)) for name in ("cat", "dog")]
    plans = divide_classes([Pairing.between(student, teacher) for teacher in teachers])
    batch = make_batch(1, boxes=2, classes=2)
    batch.targets.boxes[0] = torch.tensor([[0.0, 0, 16, 16], [32, 32, 64, 64]])
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    batch.targets.labels[0] = torch.tensor([0, 1])
    step = seen(Pair(student, teachers[1]), batch)
    maps = method("defeat", plans[1], assign="all").maps(step)
    fg, bg = maps["foreground, stride 8"][0], maps["background, stride 8"][0]
    assert fg[4:, 4:].all()
    assert fg.sum() == 16
    assert not bg[:2, :2].any()
    assert bg.sum() == 64 - 16 - 4


def test_a_teacher_at_twice_the_size_marks_the_same_part_of_the_picture() -> None:
    student, inner = TinyDetector(4), TinyDetector(4)
    models, batch = Pair(student, RescaledTeacher(inner, 2.0)), one_object((8.0, 16, 40, 48))
    plan = Pairing.between(*models)
    for name, part in (("defeat", "foreground"), ("fgfi", "near an object")):
        keys = {"assign": "all"} if name == "defeat" else {"anchor_scale": 4.0}
        mask = method(name, plan, **keys).maps(seen(models, batch))[f"{part}, stride 16"][0]
        assert mask.shape == (8, 8)
        rows = mask.nonzero()
        middle = (rows.min(0).values + rows.max(0).values + 1) * 4.0  # px: a cell of stride 16 is 8 px
        torch.testing.assert_close(middle, torch.tensor([32.0, 24.0]), atol=4.1, rtol=0)


@pytest.mark.parametrize("name", ["fgfi", "defeat", "tadf", "frs"])
def test_a_3x3_adapter_is_trained_on_every_level(name: str) -> None:
    models, batch = Pair(TinyDetector(4), TinyDetector(4)), make_batch()
    plan = Pairing.between(*models)
    everywhere = {"fgfi": {"scope": "each"}, "defeat": {"assign": "all"}, "tadf": {"assign": "all"}, "frs": {}}[name]
    trained = method(name, plan, adapter="3x3", **everywhere)
    assert [tuple(p.shape) for p in trained.parameters() if p.ndim == 4] == [(4, 4, 3, 3)] * 2
    assert not list(method(name, plan, adapter="1x1").parameters())
    step = seen(models, batch)
    torch.stack([v.mean() for v in trained.compare(step).values()]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())


def test_the_plan_says_whose_adapter_is_3x3() -> None:
    student, teacher = TinyDetector(4), TinyDetector(4)
    state, said = make_state(student)
    methods = {"defeat": DISTILLERS["defeat"].Config(), "gid": DISTILLERS["gid"].Config()}
    Distill(Teacher(teacher, "teacher.pt", "0" * 64, 1.0), methods).on_setup(state)
    assert sum("as they are; 3x3 adapter of defeat" in line for line in "\n".join(said).splitlines()) == 2


# predictions


def test_class_divergence_is_that_of_the_product_with_objectness() -> None:
    torch.manual_seed(0)
    classes = [(torch.randn(4, 3, dtype=torch.float64) * 4).requires_grad_() for _ in range(2)]
    objectness = [(torch.randn(4, dtype=torch.float64) * 4).requires_grad_() for _ in range(2)]
    p_s, p_t = (c.sigmoid() * o.sigmoid()[:, None] for c, o in zip(classes, objectness, strict=True))
    p_t = p_t.detach()
    plain = (p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()).sum(-1)
    found = class_divergence(classes[0], classes[1], objectness[0], objectness[1])
    torch.testing.assert_close(found, plain)
    leaves_ = (classes[0], objectness[0])
    for a, b in zip(torch.autograd.grad(found.sum(), leaves_), torch.autograd.grad(plain.sum(), leaves_), strict=True):
        torch.testing.assert_close(a, b)


def test_class_divergence_is_finite_for_the_surest() -> None:
    logits = torch.tensor([[1e4, -1e4, 200.0, -200.0]], requires_grad=True)
    found = class_divergence(logits, -logits.detach(), torch.tensor([-1e4]), torch.tensor([1e4]))
    assert found.isfinite().all()
    found.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_detector_with_two_predictions_in_a_cell_is_compared_by_its_best() -> None:
    torch.manual_seed(0)
    names = ["cat", "dog", "bird"]
    student = YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=True), names)
    teacher = narrow(TwoAnchors, names)
    torch.nn.init.normal_(teacher.head.cls.weight, std=0.3)  # type: ignore[arg-type]
    for pair in (Pair(student, teacher), Pair(teacher, student), Pair(teacher, narrow(TwoAnchors, names))):
        batch = make_batch(images=2, size=64)
        step = seen(pair, batch)
        for name in SERVED_ON_DENSE:
            terms = method(name, Pairing.between(*pair), **({"adapter": "1x1"} if name == "frs" else {})).compare(step)
            assert all(v.mean().isfinite() for v in terms.values())
            assert sum(float(v.mean().detach()) for v in terms.values()) > 0


def test_chens_box_term_stops_where_the_student_is_better_by_the_margin() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10]])
    near, far = torch.tensor([[1.0, 0, 11, 10]]), torch.tensor([[5.0, 0, 15, 10]])  # squared errors 0.01 and 0.25
    assert bounded_error(near, far, truth, 0.0).item() == 0
    assert bounded_error(near, far, truth, 0.3).item() == pytest.approx(0.01)
    assert bounded_error(far, near, truth, 0.0).item() == pytest.approx(0.25)


def test_gid_without_an_instance_is_zero() -> None:
    models = Pair(TinyDetector(4), TinyDetector(6))
    batch = make_batch()
    step = seen(models, batch)
    small = replace(step.student, boxes=step.student.boxes * 0), replace(step.teacher, boxes=step.teacher.boxes * 0)
    found = compared(method("gid", Pairing.between(*models)), *small, batch, models.student)
    assert {name: float(value.detach()) for name, value in found.items()} == dict.fromkeys(found, 0.0)


# what cannot be served


@pytest.mark.parametrize("name", SERVED_ON_DENSE)
def test_pairs_that_cannot_be_compared_are_refused(name: str) -> None:
    student, teacher = TinyDetector(), TinyDetector()
    with pytest.raises(UserError, match=f"--kd {name} compares what both say at the same.*teacher.scale 2"):
        method(name, Pairing.between(student, RescaledTeacher(teacher, 2.0)))
    with pytest.raises(UserError, match=f"--kd {name} .*none of the student's classes"):
        method(name, Pairing.between(student, TinyDetector(names=("tree", "car", "sky"))))
    plan = Pairing.between(student, teacher)
    with pytest.raises(UserError, match=f"--kd {name} .*every location, and the teacher gives them to proposals alone"):
        method(name, replace(plan, teacher=replace(plan.teacher, stable_locations=False)))


@pytest.mark.parametrize(
    ("name", "key", "sentence"),
    [
        ("fgfi", "beta=1", "key 'kd.beta' is of fgd, .*--kd fgfi has no such key"),
        ("defeat", "threshold=0.5", "key 'kd.threshold' is of .*--kd defeat has no such key"),
        ("gid", "tau=1", "key 'kd.tau' is of .*--kd gid has no such key"),
        ("defeat", "assign=some", "key 'kd.assign'.*'size' or 'all'"),
        ("frs", "adapter=5x5", "key 'kd.adapter'.*'1x1' or '3x3'"),
        ("gid", "k=0", "key 'kd.k'.*greater than or equal to 1"),
    ],
)
def test_a_key_of_another_method_is_refused_by_its_name(name: str, key: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(student="yolox-nano", teacher=["yolox-tiny"], kd=[name], sets=[f"kd.{key}"])


def weights(name: str, family: str) -> Tensor:
    from yoloxkd.kd.defaults import kd_defaults

    keys = kd_defaults(name, family)
    return torch.tensor([keys[k] for k in ("alpha", "beta") if k in keys])


def test_published_weights_reach_the_families() -> None:
    assert weights("frs", "gfl").tolist() == pytest.approx([0.1, 0.05])
    assert weights("frs", "fcos").tolist() == pytest.approx([0.01, 0.05])
    assert weights("frs", "retinanet").tolist() == pytest.approx([0.005, 0.02])
    assert weights("defeat", "gfl").tolist() == pytest.approx([1.5, 6.0])
    assert weights("fkd", "atss").tolist() == pytest.approx([2**0.5 * 4.2e-4, 2**0.5 * 2.4e-2], rel=2e-3)
