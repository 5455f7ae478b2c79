"""CWD, MGD and LD: plain readings of the equations, zero for equals, gradients, and real detectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kd.fakes import TinyDetector, make_batch
from tests.losses import compared, distilled
from yoloxkd.errors import UserError
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.methods.cwd import CWD, CWDConfig, channel_divergence
from yoloxkd.kd.methods.ld import LD, LDConfig, localization_divergence
from yoloxkd.kd.methods.mgd import MGD, MGDConfig, generated_error, generation
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.nn.assigners.atss import atss_match, near_misses
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.dense.gfl import GFL
from yoloxkd.nn.dense.yolox import YOLOX


def maps(*shape: int, count: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return list(torch.randn(count, *shape, dtype=torch.float64).unbind(0))


def gfl(reg_max: int = 8, names: tuple[str, ...] = ("cat", "dog", "bird")) -> GFL:
    keys: dict[str, Any] = {"backbone": "resnet18", "backbone_weights": "none", "channels": 8, "groups": 2}
    keys |= {"frozen_stages": 0, "norm_eval": False}
    return GFL(GFL.Config(**keys, stacked_convs=1, reg_max=reg_max), names).eval()


def yolox(width: float = 0.125) -> YOLOX:
    return YOLOX(YOLOX.Config(depth=0.33, width=width, depthwise=True), ["cat", "dog", "bird"]).eval()


def distil(method: str, student: DenseDetector, teacher: DenseDetector, **keys: Any) -> dict[str, Tensor]:
    kind = DISTILLERS[method]
    module = TeacherLosses(teacher, {method: kind(kind.Config(**keys), Pairing.between(student, teacher))})
    batch = make_batch()
    return distilled(module, student, batch)


# CWD


def test_cwd_equals_a_plain_reading() -> None:
    s, t = maps(3, 4, 5, 6)
    hidden = torch.rand(3, 5, 6) < 0.3
    total = 0.0
    for b in range(3):
        for c in range(4):
            there = ~hidden[b]
            p_t, p_s = (torch.softmax(f[b, c][there] / 2.0, 0) for f in (t, s))
            total += float((p_t * (p_t / p_s).log()).sum()) * 2.0**2 / 4
    assert float(channel_divergence(s, t, 2.0, hidden)) == pytest.approx(total / 3, rel=1e-9)


def test_cwd_is_zero_for_equals_and_where_no_cell_counts() -> None:
    s, t = maps(2, 3, 4, 4)
    assert float(channel_divergence(t, t, 1.0)) == 0.0
    assert float(channel_divergence(s, t, 1.0, torch.ones(2, 4, 4, dtype=torch.bool))) == 0.0
    assert float(channel_divergence(s, t, 1.0)) > 0


def test_cwd_does_not_see_a_constant_added_to_a_channel() -> None:
    s, t = maps(2, 3, 4, 4)
    shift = torch.randn(2, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(channel_divergence(s + shift, t, 1.0), channel_divergence(s, t, 1.0))


def test_cwd_gradcheck() -> None:
    s, t = maps(2, 3, 2, 3)
    hidden = torch.zeros(2, 2, 3, dtype=torch.bool)
    hidden[0, 0, 0] = True
    assert torch.autograd.gradcheck(lambda x: channel_divergence(x, t, 1.5, hidden), s.requires_grad_())


# MGD


def plain_generated(s: Tensor, t: Tensor, visible: Tensor, block: nn.Sequential) -> float:
    total = 0.0
    for b in range(len(s)):
        x = torch.stack([channel * visible[b] for channel in s[b]])
        x = torch.nn.functional.conv2d(x[None], block[0].weight, block[0].bias, padding=1).clamp(min=0)
        x = torch.nn.functional.conv2d(x, block[2].weight, block[2].bias, padding=1)
        total += float((t[b] - x[0]).square().sum())
    return total / len(s)


def test_mgd_equals_a_plain_reading() -> None:
    s, t = maps(2, 3, 4, 5)
    block = generation(3).double()
    visible = (torch.rand(2, 4, 5) < 0.5).double()
    with torch.no_grad():
        found = float(generated_error(s, t, visible, block))
        assert found == pytest.approx(plain_generated(s, t, visible, block), rel=1e-9)


def test_mgd_is_zero_when_the_block_makes_the_teachers_map() -> None:
    """With nothing hidden and a block that copies what is positive, a student that is its teacher makes no error."""
    t = maps(2, 3, 4, 4)[0].abs()
    block = generation(3).double()
    for conv in (block[0], block[2]):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    visible = torch.ones(2, 4, 4, dtype=torch.float64)
    assert float(generated_error(t, t, visible, block).detach()) == 0.0
    visible[0, 1, 1] = 0.0
    hole = (t[0, :, 1, 1] ** 2).sum() / 2
    torch.testing.assert_close(generated_error(t, t, visible, block).detach(), hole)
    excluded = visible == 0
    assert float(generated_error(t, t, visible, block, excluded).detach()) == 0.0


def test_mgd_gradcheck() -> None:
    s, t = maps(1, 2, 3, 3)
    block = generation(2).double()
    visible = torch.tensor([[[1.0, 0, 1], [1, 1, 0], [0, 1, 1]]], dtype=torch.float64)
    inputs = (s.requires_grad_(), *block.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: generated_error(x, t, visible, block), inputs)


def test_mgd_hides_by_seed_and_step_alone() -> None:
    """The same step of a resumed run hides the same cells, whatever else has drawn random numbers meanwhile."""
    torch.manual_seed(1)
    student, teacher = TinyDetector(4).eval(), TinyDetector(6).eval()
    method = MGD(MGDConfig(), Pairing.between(student, teacher))
    batch = make_batch()
    ours, theirs = student(batch.images), teacher(batch.images)

    def at(seed: int, step: int) -> float:
        torch.rand(step + seed + 1)
        return float(compared(method, ours, theirs, batch, teacher, seed, step)["generated/s8"].detach())

    before = torch.get_rng_state()
    first = compared(method, ours, theirs, batch, teacher, 3, 7)["generated/s8"]
    assert torch.equal(torch.get_rng_state(), before)
    assert at(3, 7) == float(first.detach())
    assert len({at(3, 7), at(3, 8), at(4, 7)}) == 3


# LD


def test_ld_equals_a_plain_reading() -> None:
    s, t = maps(5, 4 * 6)
    found = localization_divergence(s, t, 10.0)
    for i in range(5):
        total = 0.0
        for side in range(4):
            p_s, p_t = (torch.softmax(x[i, 6 * side : 6 * side + 6] / 10.0, 0) for x in (s, t))
            total += float((p_t * (p_t / p_s).log()).mean()) * 100.0
        assert float(found[i]) == pytest.approx(total / 4, rel=1e-9)
    assert torch.equal(localization_divergence(t, t, 10.0), torch.zeros(5, dtype=torch.float64))


def test_ld_gradcheck() -> None:
    s, t = maps(3, 4 * 5)
    assert torch.autograd.gradcheck(lambda x: localization_divergence(x, t, 4.0), s.requires_grad_())


def two_gfls() -> tuple[GFL, GFL]:
    """A student that is not its teacher."""
    torch.manual_seed(0)
    student, teacher = gfl(), gfl()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return student, teacher


def test_ld_weighs_the_students_positives_level_by_level() -> None:
    student, teacher = two_gfls()
    batch = make_batch()
    with torch.no_grad():
        ours, theirs = student(batch.images), teacher(batch.images)
        method = LD(LDConfig(alpha=2.0, beta=0.0, delta=3.0), Pairing.between(student, teacher))
        found = compared(method, ours, theirs, batch, teacher)
    match = atss_match(ours.grid, batch.targets)
    assert match.fg.any()
    expected = dict.fromkeys(found, 0.0)
    for b, a in match.fg.nonzero().tolist():
        stride = int(ours.grid.point_strides[a])
        value = float(localization_divergence(ours.box_raw[b, a], theirs.box_raw[b, a], 10.0))
        expected[f"main/s{stride}"] += 2.0 * value * float(ours.cls_logits[b, a].sigmoid().max()) / 2
        p_s, p_t = (torch.softmax(out.cls_logits[b, a] / 2.0, 0) for out in (ours, theirs))
        others = int((match.fg[b] & (ours.grid.point_strides == stride)).sum())
        expected[f"classes/s{stride}"] += 3.0 * float((p_t * (p_t / p_s).log()).mean()) * 4.0 / others / 2
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-4)
    assert all(sum(v for k, v in expected.items() if term in k) > 0 for term in ("main", "classes"))


def test_ld_weighs_the_valuable_region_by_the_anchors_overlap() -> None:
    student, teacher = two_gfls()
    batch = make_batch()
    with torch.no_grad():
        ours, theirs = student(batch.images), teacher(batch.images)
        method = LD(LDConfig(alpha=0.0, beta=2.0), Pairing.between(student, teacher))
        found = compared(method, ours, theirs, batch, teacher)
    near = near_misses(ours.grid, batch.targets, low=0.25)
    ignored = batch.targets.boxes[-1, -1]
    left_out = 0
    expected = dict.fromkeys(found, 0.0)
    for b, a in near.nonzero().tolist():
        x, y = ours.grid.points[a].tolist()
        if b == 1 and ignored[0] < x < ignored[2] and ignored[1] < y < ignored[3]:
            left_out += 1
            continue
        value = float(localization_divergence(ours.box_raw[b, a], theirs.box_raw[b, a], 10.0))
        expected[f"valuable/s{int(ours.grid.point_strides[a])}"] += 2.0 * value * float(near[b, a]) / 2
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-4)
    assert sum(expected.values()) > 0
    assert left_out > 0


def test_ld_classes_are_those_both_know() -> None:
    """The teacher's other classes, and their order, change nothing."""
    student, teacher = gfl(names=("dog", "cat", "newt")), gfl(names=("cat", "bird", "dog"))
    batch = make_batch()
    with torch.no_grad():
        ours, theirs = student(batch.images), teacher(batch.images)
    method = LD(LDConfig(alpha=0, beta=0, delta=1.0), Pairing.between(student, teacher))
    before = compared(method, ours, theirs, batch, teacher)
    theirs.cls_logits[..., 1] += 5.0
    ours.cls_logits[..., 2] -= 5.0
    after = compared(method, ours, theirs, batch, teacher)
    assert {k: float(v) for k, v in before.items()} == {k: float(v) for k, v in after.items()}
    ours.cls_logits[..., :2] = theirs.cls_logits[..., [2, 0]]
    assert all(float(v) == 0.0 for v in compared(method, ours, theirs, batch, teacher).values())


def test_ld_class_term_needs_two_classes_in_common() -> None:
    with pytest.raises(UserError, match=r"knows fewer than two"):
        LD(LDConfig(delta=1.0), Pairing.between(gfl(names=("cat", "newt", "toad")), gfl()))


def test_ld_on_some_levels_reads_the_right_ones() -> None:
    """A teacher without the student's finest level is read at the others' locations."""
    torch.manual_seed(0)
    student, teacher = gfl(), gfl()
    batch = make_batch()
    with torch.no_grad():
        ours, theirs = student(batch.images), teacher(batch.images)
    whole = LD(LDConfig(), Pairing.between(student, teacher))
    part = Pairing.between(student, teacher)
    object.__setattr__(part, "levels", part.levels[1:])
    found = compared(LD(LDConfig(), part), ours, theirs, batch, teacher)
    full = compared(whole, ours, theirs, batch, teacher)
    assert {k: float(v) for k, v in found.items()} == {k: float(v) for k, v in full.items() if not k.endswith("/s8")}


def test_ld_needs_distributions_of_equal_length() -> None:
    with pytest.raises(UserError, match=r"only gfl detectors predict, and the student"):
        LD(LDConfig(), Pairing.between(yolox(), gfl()))
    with pytest.raises(UserError, match=r"only gfl detectors predict, and the teacher"):
        LD(LDConfig(), Pairing.between(gfl(), TinyDetector()))
    with pytest.raises(UserError, match=r"student has 9 bins a side, the teacher 17"):
        LD(LDConfig(), Pairing.between(gfl(8), gfl(16)))


# the methods on detectors


@pytest.mark.parametrize("method", ["cwd", "mgd"])
def test_on_yolox_with_adapters(method: str) -> None:
    torch.manual_seed(0)
    found = distil(method, yolox(0.125), yolox(0.25))
    assert {name.rpartition("/")[2] for name in found} == {"s8", "s16", "s32"}
    assert all(v.isfinite() and v.dtype == torch.float32 for v in found.values())
    assert float(found[next(iter(found))].detach()) > 0
    torch.stack(list(found.values())).sum().backward()


def test_ld_on_gfl_trains_the_regression_only() -> None:
    torch.manual_seed(0)
    student = gfl()
    found = distil("ld", student, gfl())
    torch.stack(list(found.values())).sum().backward()
    assert student.head.gfl_reg.weight.grad is not None
    assert float(student.head.gfl_reg.weight.grad.abs().sum()) > 0
    assert student.head.gfl_cls.weight.grad is None


@pytest.mark.parametrize("branches", [["neck"], ["cls", "reg"]])
def test_cwd_branches(branches: list[str]) -> None:
    torch.manual_seed(0)
    student, teacher = TinyDetector(4).eval(), TinyDetector(6).eval()
    found = distil("cwd", student, teacher, branches=branches)
    assert set(found) == {f"cwd/{b}/s{s}" for b in branches for s in (8, 16)}
    same = distil("cwd", teacher, teacher, branches=branches)
    assert all(float(v.detach()) == 0.0 for v in same.values())


@pytest.mark.parametrize("method", ["cwd", "mgd"])
def test_float16_maps_with_large_values_stay_finite(method: str) -> None:
    torch.manual_seed(0)
    s = (torch.rand(1, 64, 80, 80) * 2000 - 1000).half().requires_grad_()
    t = (torch.rand(1, 64, 80, 80) * 2000 - 1000).half()
    if method == "cwd":
        loss = channel_divergence(s, t, 1.0)
    else:
        loss = generated_error(s, t, torch.ones(1, 80, 80), generation(64)) * 2e-5
    loss.backward()
    assert loss.isfinite()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_nothing_to_do_is_no_term() -> None:
    plan = Pairing.between(TinyDetector(), TinyDetector())
    assert CWD(CWDConfig(alpha=0), plan).terms == MGD(MGDConfig(alpha=0), plan).terms == ()
