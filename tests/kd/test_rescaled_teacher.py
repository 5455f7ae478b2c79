"""A teacher that looks at another size teaches by the same boxes, in the same pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.kd.fakes import TinyDetector, make_batch, make_state
from tests.kd.test_across_detectors import FAMILIES, SIZE, detector, distilling
from tests.losses import distilled, step_of
from yoloxkd import Trainer
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Teacher
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.methods.pgd import PGD
from yoloxkd.kd.pairing import Pairing, table
from yoloxkd.kd.rescaled_teacher import RescaledTeacher


def test_what_it_says_is_in_the_pixels_it_was_given() -> None:
    torch.manual_seed(0)
    inner = TinyDetector(levels=(8, 16)).eval()
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    twice = F.interpolate(images.float(), size=(64, 96), mode="bilinear", align_corners=False)
    with torch.no_grad():
        seen, expected = RescaledTeacher(inner, 2.0)(images), inner(twice)
    assert seen.image_size == (32, 48)
    assert seen.grid.sizes == expected.grid.sizes == ((8, 12), (4, 6))
    torch.testing.assert_close(seen.boxes, expected.boxes / 2)
    torch.testing.assert_close(seen.grid.points, expected.grid.points / 2)
    assert torch.equal(seen.cls_logits, expected.cls_logits)
    assert seen.grid.points[:, 0].max() < 48
    assert torch.equal(RescaledTeacher(inner, 1.0)(images).boxes, inner(images).boxes)
    assert RescaledTeacher(inner, 0.4).inner_size(64, 96) == (32, 32)  # rounded to multiples of 16


AT_THE_SAME_PLACES = {"ld", "gid", "frs", "chen", "response"}
"""Methods that compare predictions location by location, and refuse a teacher at another size."""


@pytest.mark.parametrize("method", [m for m in DISTILLERS if m not in AT_THE_SAME_PLACES and not DISTILLERS[m].labels])
@pytest.mark.parametrize("scale", [2.0, 0.67])
@pytest.mark.parametrize("families", [("yolox", "fcos"), ("gfl", "yolox"), ("atss", "gfl")])
def test_every_method_learns_from_another_size(families: tuple[str, str], scale: float, method: str) -> None:
    teacher, student = RescaledTeacher(detector(families[0], 1), scale), detector(families[1], 2).train()
    module = distilling(method, student, teacher)
    batch = make_batch(images=2, size=SIZE)
    terms = distilled(module, student, batch)
    for name, value in terms.items():
        assert value.isfinite(), name
        assert value >= 0, name
    assert {n.rpartition("/")[0] for n, v in terms.items() if v > 0} == {n.rpartition("/")[0] for n in terms}
    torch.stack(list(terms.values())).sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_pgd_finds_the_same_places_at_twice_the_size(family: str) -> None:
    """The center of gravity of the foreground does not move with the size that the teacher sees."""
    plain = detector(family, 1).eval()
    batch = make_batch(images=1, size=SIZE, boxes=1)
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    batch.targets.boxes[:] = torch.tensor([20.0, 30.0, 60.0, 70.0])
    for teacher in (plain, RescaledTeacher(plain, 2.0)):
        plan = Pairing.between(plain, teacher)
        pgd = PGD(PGD.Config.model_validate(kd_defaults("pgd", family) | {"foreground": "box"}), plan)
        with torch.no_grad():
            seen = teacher(batch.images)
        weights, _ = pgd.regions(step_of(seen, seen, batch, teacher))
        h, w = weights["cls"][0].shape[1:]
        y, x = torch.meshgrid((torch.arange(h) + 0.5) * SIZE / h, (torch.arange(w) + 0.5) * SIZE / w, indexing="ij")
        mass = weights["cls"][0][0] / weights["cls"][0][0].sum()
        assert abs(float((mass * x).sum()) - 40) <= 4
        assert abs(float((mass * y).sum()) - 50) <= 4


def test_the_plan_says_it_and_ld_refuses_it() -> None:
    plan = Pairing.between(detector("gfl", 1), RescaledTeacher(detector("gfl", 2), 2.0))
    assert any(
        line.startswith("size") and "resized to the teacher's" in line for line in table(plan.describe([])).splitlines()
    )
    with pytest.raises(UserError, match=r"--kd ld compares.*teacher.scale 2"):
        distilling("ld", detector("gfl", 1), RescaledTeacher(detector("gfl", 2), 2.0))


def test_the_gate_and_inheriting_see_through_it() -> None:
    student, inner = TinyDetector(), TinyDetector()
    for parameter in inner.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    evaluated: list[object] = []

    def evaluate(model: object, limit: int | None) -> dict[str, object]:
        evaluated.append(model)
        return {"AP": 0.5, "per_class": {name: {"AP": 0.5} for name in student.names}}

    state, said = make_state(student, evaluate=evaluate)
    teacher = RescaledTeacher(inner, 2.0)
    cfg = DISTILLERS["fgd"].Config.model_validate(kd_defaults("fgd", "yolox") | {"inherit": True})
    Distill([Teacher(teacher, "x.pt", "0", 1.0)], {"fgd": cfg}).on_setup(state)
    assert evaluated == [teacher]
    assert any("inherited" in line and "neck" in line for line in said)
    assert all(bool((p == 0.5).all()) for p in student.neck.parameters())


@pytest.mark.slow
def test_a_run_with_a_teacher_at_twice_the_size(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    settings = {
        "student.width": 0.125,
        "augment.multiscale": 2,
        "engine.workers": 0,
        "teacher.scale": 2,
        "teacher.min_ap": 0,
        "callbacks.report": False,
        "callbacks.plots": False,
    }
    fit = Trainer(
        student="yolox-nano", teacher=str(toy_run / "best.pt"), kd=["pgd", "fgd"], data=str(toy), epochs=1, batch=8,
        imgsz=64, device="cpu", set=settings, out=tmp_path / "run",
    ).fit()  # fmt: skip
    log = (fit.out / "train.log").read_text()
    assert "the student's maps are resized to the teacher's" in log
    assert fit.best.is_file()
