"""PGD's losses and the method around them."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kd.fakes import TinyDetector, make_batch, tiny_yolox
from tests.kd.plain import pgd_cls_by_image, pgd_reg_by_image, pgd_weights_by_object
from tests.losses import compared, means, passed, step_of
from yoloxkd.engine.callbacks.csv_log import read_rows
from yoloxkd.errors import UserError
from yoloxkd.kd.functional.importance import STRATEGIES, Predictions, pgd_weights
from yoloxkd.kd.methods.pgd import PGD, PGDConfig, pgd_cls_terms, pgd_reg_terms, scaled_channels
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.types import TASK, Batch, DenseOutput


def distil(
    student: TinyDetector, teacher: TinyDetector, batch: Batch | None = None, **keys: object
) -> tuple[PGD, dict[str, Tensor]]:
    torch.manual_seed(0)
    batch = batch or make_batch(classes=len(student.names))
    method = PGD(PGDConfig(**keys), Pairing.between(student, teacher))
    with torch.no_grad():
        seen = teacher.eval()(batch.images)
    return method, compared(method, student.eval()(batch.images), seen, batch, teacher)


def pair(student: int = 6, teacher: int = 6) -> tuple[TinyDetector, TinyDetector]:
    torch.manual_seed(1)
    return TinyDetector(student), TinyDetector(teacher)


def masks(images: int, h: int, w: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(images, h, w, generator=g, dtype=torch.float64)
    weight = weight * (torch.rand(weight.shape, generator=g) < 0.5)
    return weight, (weight == 0).double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    s = torch.randn(2, 4, 3, 2, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    t = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    weight, background = masks(2, 3, 2)

    def total(x: Tensor) -> Tensor:
        cls, reg = pgd_cls_terms(x, t, weight, background, 0.8), pgd_reg_terms(x, t, weight, 0.8)
        return cls["fg"] + 2 * cls["bg"] + 3 * cls["attention"] + 4 * reg["fea"] + 5 * reg["attention"]

    assert torch.autograd.gradcheck(total, s)


def test_images_do_not_see_each_other() -> None:
    """A batch's loss is the mean of its images' losses: the published code weighs every image by every image's mask."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    weight, background = masks(4, 6, 7)
    weight[1] = 0
    whole = pgd_cls_terms(s, t, weight, background, 0.8) | pgd_reg_terms(s, t, weight, 0.8)
    each = [
        pgd_cls_terms(s[i : i + 1], t[i : i + 1], weight[i : i + 1], background[i : i + 1], 0.8)
        | pgd_reg_terms(s[i : i + 1], t[i : i + 1], weight[i : i + 1], 0.8)
        for i in range(4)
    ]
    for name, value in whole.items():
        torch.testing.assert_close(value, torch.stack([e[name] for e in each]).mean())


def test_default_terms() -> None:
    method, found = distil(*pair())
    names = ("cls_fg", "cls_bg", "cls_attention", "reg_fea", "reg_attention")
    assert set(found) == {f"{n}/s{s}" for n in names for s in (8, 16)}
    assert [str(n._replace(source=TASK)) for n in method.terms] == list(found)
    assert all(v > 0 and v.dtype == torch.float32 for v in found.values())


@pytest.mark.parametrize("branches", [["neck"], ["cls"], ["reg"], ["neck", "reg"], ["neck", "cls", "reg"]])
def test_branches(branches: list[str]) -> None:
    method, found = distil(*pair(4, 6), branches=branches)
    assert {k.partition("_")[0] for k in found} == set(branches)
    assert len(method.adapters.convs) == 2 * len(branches)
    torch.stack(list(found.values())).sum().backward()
    assert all(p.grad is not None for p in method.parameters())


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    teacher = pair()[1]
    _, found = distil(teacher, teacher)
    assert all(float(v.detach()) == 0.0 for v in found.values())


def test_weights_follow_alpha_and_the_level() -> None:
    _, plain = distil(*pair(), level_weights=[1, 1])
    _, raised = distil(*pair(), level_weights=[1, 3])
    _, doubled = distil(*pair(), level_weights=[1, 1], alpha=0.32)
    for term in ("cls_fg", "cls_bg"):
        torch.testing.assert_close(raised[f"{term}/s16"], 3 * plain[f"{term}/s16"])
        torch.testing.assert_close(raised[f"{term}/s8"], plain[f"{term}/s8"])
    for term in ("cls_fg", "cls_bg", "reg_fea"):  # beta and gamma follow alpha unless they are given
        torch.testing.assert_close(doubled[f"{term}/s8"], 2 * plain[f"{term}/s8"])
    for term in ("cls_attention", "reg_attention"):
        torch.testing.assert_close(doubled[f"{term}/s8"], plain[f"{term}/s8"])


def test_every_strategy_runs_and_weighs_differently() -> None:
    seen = {}
    for strategy in STRATEGIES:
        _, found = distil(*pair(), foreground=strategy, k=5)
        seen[strategy] = round(float(found["cls_fg/s8"].detach()), 9)
    assert len(set(seen.values())) == len(STRATEGIES), seen


def test_unknown_classes_are_judged_by_localization() -> None:
    """With a teacher that knows no class, the weights do not depend on its class probabilities."""
    torch.manual_seed(1)
    student, teacher = TinyDetector(), TinyDetector(names=["ship", "sheep"])
    _, before = distil(student, teacher)
    with torch.no_grad():
        teacher.cls_pred.weight.add_(torch.randn_like(teacher.cls_pred.weight))
    _, after = distil(student, teacher)
    for name, value in before.items():
        assert torch.equal(value, after[name])


def test_classes_are_matched_by_name() -> None:
    """A teacher that lists the same classes in another order gives the same loss."""
    torch.manual_seed(1)
    student, teacher = TinyDetector(), TinyDetector()
    _, before = distil(student, teacher)
    order = [2, 0, 1]
    with torch.no_grad():
        teacher.cls_pred.weight.copy_(teacher.cls_pred.weight[order].clone())
        teacher.cls_pred.bias.copy_(teacher.cls_pred.bias[order].clone())
    teacher.spec = replace(teacher.spec, names=tuple(teacher.names[i] for i in order))
    _, after = distil(student, teacher)
    for name, value in before.items():
        assert torch.equal(value, after[name])


def test_only_paired_levels_are_candidates() -> None:
    torch.manual_seed(1)
    student, teacher = TinyDetector(levels=(8, 16)), TinyDetector(levels=(8, 16, 32))
    batch = make_batch()
    method = PGD(PGDConfig(k=1), Pairing.between(student, teacher))
    with torch.no_grad():
        seen = teacher.eval()(batch.images)
        weights, background = method.regions(step_of(seen, seen, batch, teacher))
    assert [tuple(w.shape[1:]) for w in weights["cls"]] == [(8, 8), (4, 4)] == [tuple(b.shape[1:]) for b in background]
    objects = batch.targets.mask.sum(1)
    chosen = sum((w > 0).sum((1, 2)) for w in weights["cls"])
    assert (chosen > 0).all()
    assert (chosen <= objects).all()


def test_ignored_and_padded_locations_belong_to_nothing() -> None:
    student, teacher = pair()
    batch = make_batch(1)
    batch.content[:] = torch.tensor([0.0, 0.0, 64.0, 40.0])
    batch.targets.boxes[0, 0] = torch.tensor([16.0, 0.0, 32.0, 16.0])
    batch.targets.mask[0], batch.targets.ignore[0] = torch.tensor([False, True, True, True]), False
    batch.targets.ignore[0, 0] = True
    method = PGD(PGDConfig(foreground="box"), Pairing.between(student, teacher))
    with torch.no_grad():
        out = teacher(batch.images)
        weights, background = method.regions(step_of(out, out, batch, teacher))
    used = (weights["cls"][0] + background[0])[0]
    assert float(used[5:].sum()) == 0.0
    assert float(used[:2, 2:4].sum()) == 0.0
    assert float(used[:5].count_nonzero()) == 5 * 8 - 4


def test_no_boxes_leaves_background_and_attention() -> None:
    batch = make_batch()
    batch.targets.mask[:] = False
    _, found = distil(*pair(), batch=batch)
    for name, value in found.items():
        assert (float(value.detach()) > 0) == name.startswith(("cls_bg", "cls_attention")), name


def test_too_few_level_weights_are_named() -> None:
    with pytest.raises(UserError, match="level_weights has 1 numbers for 2"):
        distil(*pair(), level_weights=[1.0])


def plain_pgd(method: PGD, student: DenseOutput, teacher: DenseOutput, batch: Batch) -> dict[str, Tensor]:
    """`compare` with normalize image and channel_scale std, an image at a time; level weights and weights of 1."""
    weights, background = method.regions(step_of(student, teacher, batch, TinyDetector()))
    images, out = len(batch.images), dict[str, Tensor]()
    for b in range(images):
        cells = {
            name: sum(int((w[b] != 0).sum()) for w in maps) for name, maps in (weights | {"bg": background}).items()
        }
        for i, stride in enumerate((8, 16)):
            pairs = []
            for tap in ("cls_features", "reg_features"):
                s, t = getattr(student, tap)[i][b], getattr(teacher, tap)[i][b]
                deviation = (t - t.mean((1, 2), keepdim=True)).square().mean((1, 2)).sqrt()
                deviation = deviation.clamp_min(0.1 * float(deviation.square().mean().sqrt()))[:, None, None]
                pairs.append(((s / deviation)[None], (t / deviation)[None]))
            (cls, reg), tau = pairs, method.cfg.tau
            masks = weights["cls"][i][b : b + 1].double(), background[i][b : b + 1].double()
            terms = {f"cls_{term}": v for term, v in pgd_cls_by_image(*cls, *masks, tau).items()}
            at = weights["reg"][i][b : b + 1].double()
            terms |= {f"reg_{term}": v for term, v in pgd_reg_by_image(*reg, at, tau).items()}
            own = {"cls_fg": (masks[0], cells["cls"]), "cls_bg": (masks[1], cells["bg"]), "reg_fea": (at, cells["reg"])}
            for term, (mask, of_image) in own.items():
                terms[term] = terms[term] * int((mask != 0).sum()) / max(of_image, 1)
            for term, value in terms.items():
                key = f"{term}/s{stride}"
                out[key] = out.get(key, torch.zeros((), dtype=torch.float64)) + value / images
    return out


def test_one_normalizer_over_levels_and_scaled_channels_equal_their_plain_reading() -> None:
    batch = make_batch()
    student, teacher = (detector.double().eval() for detector in pair())
    ones = {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "delta": 1.0, "level_weights": [1.0, 1.0]}
    cfg = PGDConfig.model_validate(ones | {"normalize": "image", "channel_scale": "std"})
    method = PGD(cfg, Pairing.between(student, teacher)).double()
    with torch.no_grad():
        seen, out = teacher(batch.images), student(batch.images)
    maps = [m.requires_grad_() for m in (*out.cls_features, *out.reg_features)]
    ours, plain = compared(method, out, seen, batch, teacher), plain_pgd(method, out, seen, batch)
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(*(torch.autograd.grad(sum(t.values()), maps) for t in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_channel_that_hardly_varies_is_not_raised_without_bound() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 1, 4, 6, 6, dtype=torch.float64)
    t[:, 0], t[:, 1] = 3.0, t[:, 1] * 100
    scaled = scaled_channels(s, t)
    assert float(scaled[1][:, 1].std(correction=0)) == pytest.approx(1.0)  # an outlier channel counts as the others
    assert float(scaled[0][:, 0].abs().max() / s[:, 0].abs().max()) < 1.0
    assert all(x.isfinite().all() for x in scaled_channels(s, torch.zeros_like(t)))


@pytest.mark.parametrize("devices", [("cpu",), ()])
def test_a_share_of_the_locations_inside(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """An object takes its k best, and at most so many of those that it has; either way to find them."""
    monkeypatch.setattr("yoloxkd.ops.devices.READ_DEVICES", devices)
    batch, teacher = make_batch(), pair()[1].eval()
    with torch.no_grad():
        out = teacher(batch.images)
        seen = Predictions(out.grid.points, teacher.class_probability(out), out.boxes)
    targets = batch.targets
    of = seen, targets.boxes, targets.labels, targets.mask
    for k, share in ((30, 0.1), (30, 0.5), (2, 0.5), (30, 1e-9)):
        (found,) = pgd_weights(*of, xi=(0.8,), k=k, k_share=share)
        torch.testing.assert_close(found, pgd_weights_by_object(*of, 0.8, k, max(share, 1e-5)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(pgd_weights(*of, xi=(0.8,), k=30)[0], pgd_weights(*of, xi=(0.8,), k=30, k_share=0.1)[0])
    assert torch.equal(pgd_weights(*of, xi=(0.8,), k=3), pgd_weights(*of, xi=(0.8,), k=3, k_share=1.0))


@pytest.mark.parametrize("foreground", ["box", "box-gauss", "center", "quality"])
def test_a_share_of_locations_that_are_not_chosen_is_refused(foreground: str) -> None:
    with pytest.raises(
        ValueError, match=r"k_share limits how many of the best.*set foreground to topk-eq, kde or gauss"
    ):
        PGDConfig(foreground=foreground, k_share=0.1)


def test_on_batch_statistics_a_student_with_its_teachers_weights_pays_nothing() -> None:
    torch.manual_seed(0)
    teacher, batch = tiny_yolox(2).eval(), make_batch()
    student = deepcopy(teacher).train()
    before = deepcopy(teacher.state_dict())
    total = {}
    for statistics in ("running", "batch"):
        cfg = PGDConfig(statistics=statistics)
        module = TeacherLosses(teacher, {"pgd": PGD(cfg, Pairing.between(student, teacher))})
        module.prepare(batch)
        total[statistics] = float(sum(means(module(passed(student, batch))).values()).detach())
    assert total["running"] > 0.01
    assert total["batch"] == 0.0
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_float16_maps_with_large_values_stay_finite() -> None:
    s = (torch.rand(1, 256, 160, 160) * 2000 - 1000).half().requires_grad_()
    t = (torch.rand(1, 256, 160, 160) * 2000 - 1000).half()
    weight = torch.rand(1, 160, 160)
    terms = pgd_cls_terms(s, t, weight, 1 - weight, 0.8) | pgd_reg_terms(s, t, weight, 0.8)
    assert all(v.isfinite() and v.dtype == torch.float32 for v in terms.values())
    weights = {"fg": 0.16, "bg": 0.08, "attention": 8e-4, "fea": 0.064}
    sum(terms[k] * w for k, w in weights.items()).backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_columns_of_earlier_versions_have_todays_names(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("epoch,loss/pgd@2/cls_att/s8,loss/pgd/neck_att/s16,loss/box\n1,2,3,4\n")
    (row,) = read_rows(tmp_path / "results.csv")
    assert row == {
        "epoch": "1",
        "loss/pgd@2/cls_attention/s8": "2",
        "loss/pgd/neck_attention/s16": "3",
        "loss/box": "4",
    }
