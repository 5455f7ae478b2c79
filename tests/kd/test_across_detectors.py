"""Any detector teaches any other, with every method."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch

from tests.kd.fakes import make_batch
from tests.kd.plain import pgd_weights_by_object
from tests.losses import distilled, step_of
from tests.nn.fpn import SHALLOW, narrow
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.functional.importance import Predictions
from yoloxkd.kd.functional.predictions import counted_locations
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.dense.yolox import YOLOX

NAMES = ["cat", "dog", "bird"]
SIZE = 96
FAMILIES = tuple(name for name, kind in DETECTORS.items() if issubclass(kind, DenseDetector))
DISTRIBUTIONS = {"ld": {"gfl"}}
"""Methods that distil distributions of box sides, and the families that predict them."""
OF_ALL_LEVELS = {"gid", "mimic"}
"""Methods whose terms belong to no level."""
MAY_BE_ZERO = {"chen/box", "gid/relation"}
"""Terms that are zero where the student is no worse than the teacher, and where one region alone is left."""
ANYWHERE = [m for m in DISTILLERS if m not in DISTRIBUTIONS and not DISTILLERS[m].labels]
PAIRS = list(itertools.product(FAMILIES, FAMILIES))
COVERING = [
    (teacher, FAMILIES[(i + j) % len(FAMILIES)], method)
    for j, method in enumerate(ANYWHERE)
    for i, teacher in enumerate(FAMILIES)
] + [(family, family, method) for method, families in DISTRIBUTIONS.items() for family in families]
"""Teacher, student and method: every method with every family as teacher and as student, and every pair of families; what a
method does beside that is in its contract."""


def term_of(name: str) -> str:
    """`fgd/fg` of `fgd/fg/s8`; `gid/cls` has no level."""
    return "/".join(name.split("/")[:2])


def detector(family: str, seed: int, channels: int = 16) -> DenseDetector:
    """A copy of the one detector of these arguments; the random generator is as after building it."""
    model, state = built(family, seed, channels)
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def built(family: str, seed: int, channels: int) -> tuple[DenseDetector, torch.Tensor]:
    torch.manual_seed(seed)
    if family == "yolox":
        return YOLOX(YOLOX.Config(depth=0.1, width=0.125, depthwise=True), NAMES), torch.get_rng_state()
    keys = {"backbone": SHALLOW, "stacked_convs": 1, "channels": channels}
    model: DenseDetector = narrow(DETECTORS[family], NAMES, **keys)  # type: ignore[arg-type]
    # boxes of an untrained head overlap nothing where its distances are zero
    for parameter in model.get_submodule("head").parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model, torch.get_rng_state()


def distilling(method: str, student: DenseDetector, teacher: DenseDetector) -> TeacherLosses:
    kind = DISTILLERS[method]
    cfg = kind.Config.model_validate(kd_defaults(method, student.family))
    return TeacherLosses(teacher, {method: kind(cfg, Pairing.between(student, teacher))})


@pytest.mark.parametrize(("teacher_family", "student_family", "method"), COVERING)
def test_two_steps(teacher_family: str, student_family: str, method: str) -> None:
    """Terms are finite and positive, and the student and the adapters learn, nothing else."""
    teacher = detector(teacher_family, 1, channels=24) if teacher_family != "yolox" else detector("yolox", 1)
    student = detector(student_family, 2).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    module = distilling(method, student, teacher)
    own = [*student.parameters(), *module.parameters()]
    optimizer = torch.optim.SGD(own, lr=1e-4)
    common = set(student.spec.strides) & set(teacher.spec.strides)
    for step in range(2):
        batch = make_batch(images=2, size=SIZE, seed=step)
        terms = distilled(module, student, batch)
        by_level = {int(level) for _, _, level in (name.rpartition("/s") for name in terms) if level.isdigit()}
        assert by_level == common or method in OF_ALL_LEVELS
        for name, value in terms.items():
            assert value.isfinite(), name
            assert value >= 0, name
        positive = {term_of(name) for name, value in terms.items() if value > 0}
        assert {term_of(name) for name in terms} - positive <= MAY_BE_ZERO
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
        assert all(p.grad is None or p.grad.isfinite().all() for p in own)
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        optimizer.step()
    assert not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_pgd_weighs_a_location_by_the_best_of_its_predictions(family: str) -> None:
    """Object by object, and by the class probability of the family (YOLOX, AutoAssign: times objectness)."""
    teacher, batch = detector(family, 1).eval(), make_batch(size=SIZE)
    out, targets = teacher(batch.images), batch.targets
    method = PGD(PGDConfig(), Pairing.between(teacher, teacher))
    found, _ = method.regions(step_of(out, out, batch, teacher))
    probability = out.cls_logits.sigmoid()
    if family in ("yolox", "autoassign"):
        probability = probability * out.quality.sigmoid().unsqueeze(-1)
    points = out.grid.points[:: out.grid.per_cell]
    assert out.grid.per_cell == (9 if family == "retinanet" else 1)
    seen = Predictions(points, probability, out.boxes)
    for branch, xi in (("cls", 0.8), ("reg", 0.6)):
        wanted = pgd_weights_by_object(seen, targets.boxes, targets.labels, targets.mask, xi)
        assert (wanted > 0).any()
        wanted = wanted * counted_locations(out.grid.of_cells(), batch)
        torch.testing.assert_close(torch.cat([level.flatten(1) for level in found[branch]], 1), wanted)


@pytest.mark.parametrize(
    ("method", "teacher_family", "student_family"), [("ld", "fcos", "gfl"), ("ld", "gfl", "yolox")]
)
def test_a_pair_that_a_method_cannot_distil_is_refused(method: str, teacher_family: str, student_family: str) -> None:
    with pytest.raises(UserError, match=f"--kd {method}.*only gfl"):
        distilling(method, detector(student_family, 1), detector(teacher_family, 2))


def test_every_pair_and_every_method_is_covered() -> None:
    assert {(teacher, student) for teacher, student, _ in COVERING} == set(PAIRS)
    assert {method for *_, method in COVERING} == {m for m in DISTILLERS if not DISTILLERS[m].labels}
    for place in (0, 1):
        assert {(case[place], case[2]) for case in COVERING} >= set(itertools.product(FAMILIES, ANYWHERE))
