"""Every distillation method keeps the contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.kd import test_baselines_contract
from tests.kd.contract import DistillerContract, half_ignored, in_dtype, leaves, whole_images
from tests.kd.fakes import make_batch, tiny_yolox
from tests.kd.plain import fgd_by_object, pgd_by_object
from tests.kd.plain_predictions import crosskd_by_prediction, response_by_prediction
from tests.kd.test_methods import plain_generated, two_gfls
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller, Pair, Step
from yoloxkd.kd.methods.crosskd import CrossKD
from yoloxkd.kd.methods.cwd import CWD
from yoloxkd.kd.methods.fgd import FGD
from yoloxkd.kd.methods.lad import LAD
from yoloxkd.kd.methods.ld import LD
from yoloxkd.kd.methods.mgd import MGD, _mixed
from yoloxkd.kd.methods.pgd import PGD
from yoloxkd.kd.methods.pkd import PKD
from yoloxkd.kd.methods.response import Response
from yoloxkd.kd.pairing import Pairing, match_classes
from yoloxkd.nn.assigners.atss import near_misses
from yoloxkd.nn.assigners.match import Match
from yoloxkd.types import DenseOutput


class TestFGD(DistillerContract):
    kind = FGD
    statistics = ("attention/", "global/")

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, FGD)
        return fgd_by_object(method, step.student, step.teacher, step.batch, step.models.teacher)

    def alike(self, method: Distiller) -> None:
        assert isinstance(method, FGD)
        for block in method.student_blocks.values():
            nn.init.normal_(block.expand.weight, std=0.1)
        method.teacher_blocks.load_state_dict(method.student_blocks.state_dict())

    def test_maps_are_what_its_terms_weigh_with(self) -> None:
        models = self.pair()
        step = self.step(models, make_batch())
        maps = self.method(models).maps(step)
        assert {"foreground, stride 8", "background, stride 16", "attention, stride 8"} <= maps.keys()
        assert not (maps["foreground, stride 8"] * maps["background, stride 8"]).any()
        torch.testing.assert_close(maps["attention, stride 8"].mean((1, 2)), torch.ones(2))


class TestPGD(DistillerContract):
    kind = PGD
    statistics = ("cls_attention/", "reg_attention/", "neck_attention/")

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, PGD)
        return pgd_by_object(method, step.student, step.teacher, step.batch, step.models.teacher)

    def test_maps_are_what_its_terms_weigh_with(self) -> None:
        models = self.pair()
        method, step = self.method(models), self.step(models, make_batch())
        assert isinstance(method, PGD)
        maps, (weights, background) = method.maps(step), method.regions(step)
        assert len(maps) == 2 * 3
        assert torch.equal(maps["cls foreground, stride 16"], weights["cls"][1])
        assert torch.equal(maps["background, stride 8"], background[0])


class TestCWD(DistillerContract):
    kind = CWD

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, CWD)
        out = {}
        for stride, ours, theirs in zip((8, 16), step.student.features, step.teacher.features, strict=True):
            total = torch.zeros(())
            for s, t in zip(ours.flatten(0, 1), theirs.flatten(0, 1), strict=True):
                p_t, p_s = (torch.softmax(x.flatten() / method.cfg.tau, 0) for x in (t, s))
                total = total + (p_t * (p_t / p_s).log()).sum() * method.cfg.tau**2 / ours.shape[1]
            out[f"neck/s{stride}"] = total / len(ours) * method.cfg.alpha
        return out


class TestNormalizedCWD(TestCWD):
    keys = {"normalize": True}

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        def normal(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(torch.nn.functional.instance_norm(m) for m in maps)

        student, teacher = (replace(out, features=normal(out.features)) for out in (step.student, step.teacher))
        return super().plain(method, replace(step, student=student, teacher=teacher))

    def test_strength_of_a_channel_does_not_count(self) -> None:
        models = self.twins()
        method, step = self.method(models), self.step(models, make_batch())

        def under(factor: float) -> dict[str, Tensor]:
            features = tuple(m * factor for m in step.teacher.features)
            return self.found(method, replace(step, teacher=replace(step.teacher, features=features)))

        before = under(100.0)
        for name, value in under(300.0).items():
            torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4)


class TestMGD(DistillerContract):
    kind = MGD
    draws = True
    sees_everything = True  # its block looks around each cell, so that the student's cells there may help others

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, MGD)
        draws, out = torch.Generator().manual_seed(_mixed(step.seed, step.number)), {}
        for stride, s, t in zip((8, 16), step.student.features, step.teacher.features, strict=True):
            visible = (torch.rand(len(s), *s.shape[2:], generator=draws) >= method.cfg.mask_ratio).float()
            block = method.blocks[f"s{stride}"]
            assert isinstance(block, nn.Sequential)
            out[f"generated/s{stride}"] = (
                torch.tensor(plain_generated(s.detach(), t, visible, block)) * method.cfg.alpha
            )
        return out

    def test_nothing_to_learn_from_oneself(self) -> None:
        """Where nothing is hidden and the block copies what is positive."""
        models = self.twins()
        method, step = self.method(models, mask_ratio=0.0, alpha=1.0), self.step(models, make_batch())
        assert isinstance(method, MGD)
        for module in method.blocks.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.dirac_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        step = replace(step, teacher=replace(step.teacher, features=tuple(m.abs() for m in step.teacher.features)))
        alike = self.found(method, replace(step, student=leaves(step.teacher)))
        assert all(float(v.detach()) == 0.0 for v in alike.values())
        assert all(float(v.detach()) > 0.0 for v in self.found(method, step).values())

    def test_it_does_not_ask_what_the_teacher_sees_in_an_ignore_region(self) -> None:
        models = self.pair()
        method, step = self.method(models), self.step(models, half_ignored())
        before = self.found(method, step)
        for stride, value in zip((8, 16), step.teacher.features, strict=True):
            value[..., torch.arange(value.shape[3]) * stride > 38] += 3.0
        assert all(torch.equal(v, before[n]) for n, v in self.found(method, step).items())
        step.batch.targets.ignore[:] = False
        assert not any(torch.equal(v, before[n]) for n, v in self.found(method, step).items())


class TestLD(DistillerContract):
    kind = LD
    keys = {"beta": 1.0, "delta": 1.0}
    reads = ("box_raw", "cls_logits")

    def pair(self) -> Pair:
        return Pair(*two_gfls())

    twins = pair

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, LD)
        cfg, ours, theirs, match = method.cfg, step.student, step.teacher, step.match
        names = [f"{term}/s{stride}" for stride in ours.grid.strides for term in ("main", "valuable", "classes")]
        out = {name: torch.zeros(()) for name in names}
        strides = ours.grid.point_strides

        def divergence(b: int, a: int) -> Tensor:
            sides = zip(*(x.box_raw[b, a].view(4, -1) / cfg.tau for x in (ours, theirs)), strict=True)
            return (
                torch.stack([(t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).mean() for s, t in sides]).mean()
                * cfg.tau**2
            )

        for b, a in match.fg.nonzero().tolist():
            stride = int(strides[a])
            sure = ours.cls_logits[b, a].sigmoid().max()
            out[f"main/s{stride}"] += cfg.alpha * divergence(b, a) * sure / 2
            s, t = (x.cls_logits[b, a] / cfg.tau_cls for x in (ours, theirs))
            kl = (t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).mean() * cfg.tau_cls**2
            out[f"classes/s{stride}"] += cfg.delta * kl / (match.fg[b] & (strides == stride)).sum() / 2
        near = near_misses(ours.grid, step.batch.targets, low=cfg.low)
        for b, a in near.nonzero().tolist():
            out[f"valuable/s{int(strides[a])}"] += cfg.beta * divergence(b, a) * near[b, a] / 2
        return {name: value.detach() for name, value in out.items()}


class TestPKD(DistillerContract):
    kind = PKD

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, PKD)
        out = {}
        for stride, ours, theirs in zip((8, 16), step.student.features, step.teacher.features, strict=True):
            channels = zip(ours.transpose(0, 1).flatten(1), theirs.transpose(0, 1).flatten(1), strict=True)
            r = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in channels]
            # with deviations of n - 1 degrees of freedom
            n = ours[:, 0].numel()
            out[f"neck/s{stride}"] = method.cfg.alpha * (1 - torch.stack(r)).mean() * (n - 1) / n
        return out

    def test_strength_and_offset_of_a_channel_do_not_count(self) -> None:
        models = self.twins()
        method, step = self.method(models), self.step(models, make_batch())
        again = tuple(m * 3.0 + 2.0 for m in step.teacher.features)
        before = self.found(method, step)
        for name, value in self.found(method, replace(step, teacher=replace(step.teacher, features=again))).items():
            torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4)


class TestResponse(DistillerContract):
    kind = Response
    reads = ("cls_logits", "boxes")

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, Response)
        count = sum(max(1, int(fg.sum())) for fg in step.match.fg)
        return {name: total / count for name, total in response_by_prediction(method, step).items()}

    def test_gradients_in_float64(self) -> None:
        """Of each term by what it pulls: the boxes' weight is a constant."""
        models = self.pair()
        for term, names in {"alpha": ("cls_logits", "quality"), "beta": ("boxes",), "gamma": ("quality",)}.items():
            keys = dict.fromkeys(("alpha", "beta", "gamma"), 0.0) | {term: self.keys.get(term, 1.0)}
            if keys[term] == 0 or (term == "gamma" and models.student.spec.quality != "objectness"):
                continue
            method, step = self.method(models, **keys), self.step(models, make_batch(size=32))
            sides = (in_dtype(leaves(out), torch.float64) for out in (step.student, step.teacher))
            student, teacher = sides
            step = replace(step, student=student, teacher=teacher)
            inputs = [getattr(student, name).requires_grad_() for name in names if getattr(student, name) is not None]

            def total(*_: Tensor, method: Distiller = method, step: Step[DenseOutput] = step) -> Tensor:
                return torch.stack(list(self.found(method, step).values())).sum()

            assert float(total().detach()) > 0
            torch.manual_seed(2)
            assert torch.autograd.gradcheck(total, inputs, fast_mode=True, atol=1e-4)

    def test_classes_are_paired_by_name(self) -> None:
        """The teacher's order does not matter, nor what else it knows; of what it does not know nothing is learnt."""
        models = self.pair()
        step = self.step(models, make_batch())
        student = models.student.spec.names
        order = [2, 0]
        renamed = replace(models.teacher.spec, names=(student[2], "ship", student[0]))
        logits = step.teacher.cls_logits
        teacher = replace(step.teacher, cls_logits=torch.stack([logits[..., 2], logits[..., 1], logits[..., 0]], -1))
        plan = replace(Pairing.between(*models), teacher=renamed, classes=match_classes(student, renamed.names))
        method = self.kind(self.kind.Config.model_validate(self.keys), plan)
        torch.stack(list(self.found(method, replace(step, teacher=teacher)).values())).sum().backward()
        grad = step.student.cls_logits.grad
        assert grad is not None
        assert grad[..., order].any()
        assert not grad[..., 1].any()


class TestResponseWithObjectness(TestResponse):
    keys = {"gamma": 1.0}
    reads = ("cls_logits", "boxes", "quality")

    def pair(self) -> Pair:
        return Pair(*(tiny_yolox(seed).eval() for seed in (1, 2)))

    twins = pair

    def test_float16_maps_with_large_values(self) -> None:
        pytest.skip("it reads no maps")


class TestCrossKD(DistillerContract):
    kind = CrossKD
    keys = {"position": 1, "gamma": 1.0}
    sees_everything = True  # the teacher's blocks look around each cell

    def pair(self) -> Pair:
        return Pair(tiny_yolox(1).eval(), tiny_yolox(2, width=0.0625).eval())

    def twins(self) -> Pair:
        return Pair(tiny_yolox(1).eval(), tiny_yolox(2).eval())

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        assert isinstance(method, CrossKD)
        return crosskd_by_prediction(method, step)

    def test_float16_maps_with_large_values(self) -> None:
        """Of a head whose boxes are no exponentials: those of YOLOX overflow, and are left out of their step."""
        models = super().pair()
        method = self.method(models)
        step = self.step(models, make_batch())
        step = replace(step, match=Match.of(torch.ones_like(step.match.fg), torch.zeros_like(step.match.gt)))
        student, teacher = (in_dtype(leaves(out, 1000.0), torch.float16) for out in (step.student, step.teacher))
        step = replace(step, student=leaves(student), teacher=teacher)
        found = self.found(method, step)
        assert all(v.isfinite() and v.dtype == torch.float32 for v in found.values())
        (torch.stack(list(found.values())).sum() * 1e-6).backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in self.read(method, step))

    def test_it_does_not_ask_what_the_teacher_says_in_an_ignore_region(self) -> None:
        models = self.pair()
        method, step = self.method(models), self.step(models, half_ignored())
        before = self.found(method, step)
        inside = step.teacher.grid.points[:, 0] > 38
        for name in ("cls_logits", "box_raw", "quality"):
            getattr(step.teacher, name)[:, inside] += 3.0
        assert all(torch.equal(v, before[n]) for n, v in self.found(method, step).items())
        step.batch.targets.ignore[:] = False
        after = self.found(method, step)
        assert not any(torch.equal(v, before[n]) for n, v in after.items() if not n.startswith("boxes/"))


class TestLAD(DistillerContract):
    """It has labels where others have losses: what is held here are the positives (tests/kd/test_lad.py trains on them)."""

    kind = LAD

    def pair(self) -> Pair:
        return Pair(tiny_yolox(1).eval(), tiny_yolox(2).eval())

    twins = pair

    def positives(self, models: Pair, step: Step[DenseOutput]) -> Tensor:
        seen = self.method(models).assigned_from(step.student, step.teacher)
        fg: Tensor = models.student.assign(seen, step.batch.targets).fg
        return fg

    def test_terms_are_those_declared(self) -> None:
        models = self.pair()
        method, step = self.method(models), self.step(models, make_batch())
        assert (method.terms, method.compare(step), method.counted) == ((), {}, True)
        assert not list(method.parameters())

    def test_equals_its_plain_reading(self) -> None:
        models = self.pair()
        step = self.step(models, whole_images())
        assert torch.equal(self.positives(models, step), models.teacher.assign(step.teacher, step.batch.targets).fg)

    def test_nothing_to_learn_from_oneself(self) -> None:
        models = self.pair()
        step = self.step(Pair(models.student, models.student), make_batch())
        assert torch.equal(self.positives(models, step), step.match.fg)

    def test_gradients_in_float64(self) -> None:
        models = self.pair()
        step = self.step(models, make_batch())
        seen = self.method(models).assigned_from(step.student, step.teacher)
        assert not any(x.requires_grad for x in (seen.cls_logits, seen.boxes, seen.quality))

    def test_float16_maps_with_large_values(self) -> None:
        models = self.pair()
        step = self.step(models, make_batch())
        teacher = in_dtype(step.teacher, torch.float16)
        agree = self.positives(models, step) == self.positives(models, replace(step, teacher=teacher))
        assert agree.float().mean() > 0.99

    def test_an_ignore_region_teaches_nothing(self) -> None:
        models = self.pair()
        step = self.step(models, half_ignored())
        assert step.batch.targets.ignore.any()
        before = self.positives(models, step)
        assert before.any()
        assert not before[:, step.teacher.grid.points[:, 0] > 48].any()

    def test_what_is_drawn_follows_from_seed_and_number(self) -> None:
        models = self.pair()
        first, second = (self.positives(models, self.step(models, make_batch(), 3, number)) for number in (7, 8))
        assert torch.equal(first, second)


def test_no_method_is_left_out() -> None:
    kinds = {*DistillerContract.__subclasses__(), *test_baselines_contract.Baseline.__subclasses__()}
    modules = (__name__, test_baselines_contract.__name__)
    tested = {kind.kind for kind in kinds if kind.__module__ in modules and hasattr(kind, "kind")}
    assert tested == set(DISTILLERS.values())
    assert {name: kind.name for name, kind in DISTILLERS.items()} == {name: name for name in DISTILLERS}
