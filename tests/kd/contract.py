"""What every distillation method has to do, as one test class: a new method inherits it and gives its plain reading."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.kd.fakes import TinyDetector, make_batch
from tests.losses import means
from yoloxkd.engine.parallel import gradients
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd.base import Distiller, Pair, Step
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.types import TASK, Batch, DenseOutput, Draw, Tap

PREDICTIONS = ("cls_logits", "box_raw", "boxes", "quality")


class DistillerContract:
    """Inherit, and give `kind` and `plain`.

    keys             of its Config
    draws            whether it draws at random
    sees_everything  whether ignore regions and padding count as anything else, because it compares whole maps
    statistics       terms that compare statistics of whole maps, and so see every cell
    objects_alone    whether what is no object teaches nothing anyway
    reads            predictions that it reads of the student, beside the maps of its `needs`
    """

    kind: ClassVar[type[Distiller]]
    keys: ClassVar[dict[str, Any]] = {}
    draws: ClassVar[bool] = False
    sees_everything: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()
    objects_alone: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()

    def pair(self) -> Pair:
        """A student and a teacher it can distil, without channels in common, in evaluation mode."""
        torch.manual_seed(0)
        return Pair(TinyDetector(4).eval(), TinyDetector(6).eval())

    def twins(self) -> Pair:
        """A student and a teacher with the same channels and other weights."""
        torch.manual_seed(0)
        return Pair(TinyDetector(4).eval(), TinyDetector(4).eval())

    def plain(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        """The terms of twins, as the paper's equations read."""
        raise NotImplementedError

    def alike(self, method: Distiller) -> None:
        """Set what is trained between student and teacher so that equals are equal."""

    # what the tests are made of

    def method(self, models: Pair, **keys: Any) -> Distiller:
        torch.manual_seed(1)
        return self.kind(self.kind.Config.model_validate(self.keys | keys), Pairing.between(*models))

    def step(self, models: Pair, batch: Batch, *draw: int) -> Step[DenseOutput]:
        """Both have seen the batch; the student's output has gradients of its own."""
        with torch.no_grad():
            student, teacher = (model(batch.images) for model in models)
        match = models.student.assign(student, batch.targets, Draw(*draw))
        return Step(leaves(student), teacher, batch, match, models, *draw)

    def read(self, method: Distiller, step: Step[DenseOutput]) -> list[Tensor]:
        """The student's tensors that it learns through."""
        maps = [m for tap in Tap if tap in method.needs for m in getattr(step.student, tap)]
        return maps + [getattr(step.student, name) for name in self.reads]

    def found(self, method: Distiller, step: Step[DenseOutput]) -> dict[str, Tensor]:
        return means({name._replace(source=TASK): loss for name, loss in method.compare(step).items()})

    # the tests

    def test_terms_are_those_declared(self) -> None:
        models = self.pair()
        method, step = self.method(models), self.step(models, make_batch())
        losses = method.compare(step)
        assert set(losses) == set(method.terms)
        assert {name.source for name in losses} == {self.kind.name}
        assert any(loss.count is not None for loss in losses.values()) == method.counted
        for name, loss in losses.items():
            value = loss.mean()
            assert value.ndim == 0, name
            assert value.dtype == torch.float32, name
            assert value.isfinite(), name
            assert value >= 0, name
        assert {name.term for name, loss in losses.items() if loss.mean() > 0} == {name.term for name in losses}
        torch.stack(list(self.found(method, step).values())).sum().backward()
        assert any(x.grad is not None and x.grad.abs().sum() > 0 for x in self.read(method, step))
        assert all(p.grad is not None for p in method.parameters())

    def test_equals_its_plain_reading(self) -> None:
        models = self.twins()
        method, step = self.method(models), self.step(models, whole_images())
        found, plain = self.found(method, step), self.plain(method, step)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value.to(found[name].dtype), rtol=2e-3, atol=1e-7, msg=name)

    def test_nothing_to_learn_from_oneself(self) -> None:
        """The student that says what its teacher says is at the loss's minimum, zero, where no gradient pulls it away."""
        models = self.twins()
        method, step = self.method(models), self.step(models, make_batch())
        self.alike(method)
        step = replace(step, student=leaves(step.teacher))
        found = self.found(method, step)
        assert {name: float(value.detach()) for name, value in found.items()} == pytest.approx(
            dict.fromkeys(found, 0), abs=1e-6
        )
        torch.stack(list(found.values())).sum().backward()
        grads = [x.grad for x in self.read(method, step) if x.grad is not None]
        assert all(float(grad.abs().max()) < 1e-5 for grad in grads)

    def test_gradients_in_float64(self) -> None:
        models = self.pair()
        method = self.method(models).double()
        step = self.step(models, make_batch(size=32))
        step = replace(
            step, student=in_dtype(step.student, torch.float64), teacher=in_dtype(step.teacher, torch.float64)
        )
        for model in models:
            model.double()
        inputs = [x.requires_grad_() for x in self.read(method, step)]

        def total(*_: Tensor) -> Tensor:
            return torch.stack(list(self.found(method, step).values())).sum()

        assert float(total().detach()) > 0
        torch.manual_seed(2)
        assert torch.autograd.gradcheck(total, inputs, fast_mode=True, atol=1e-4)

    def test_float16_maps_with_large_values(self) -> None:
        models = self.pair()
        method = self.method(models)
        step = self.step(models, make_batch())
        sides = (in_dtype(leaves(out, 1000.0), torch.float16) for out in (step.student, step.teacher))
        student, teacher = sides
        step = replace(step, student=leaves(student), teacher=teacher)
        found = self.found(method, step)
        assert all(v.isfinite() and v.dtype == torch.float32 for v in found.values())
        (torch.stack(list(found.values())).sum() * 1e-6).backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in self.read(method, step))

    def test_an_ignore_region_teaches_nothing(self) -> None:
        """No gradient reaches its cells, and what the teacher says there changes nothing."""
        if self.sees_everything:
            pytest.skip("it compares whole maps")
        models = self.pair()
        method, step = self.method(models), self.step(models, half_ignored())

        def learnt(step: Step[DenseOutput]) -> Tensor:
            found = {n: v for n, v in self.found(method, step).items() if not n.startswith(self.statistics)}
            assert found
            return torch.stack(list(found.values())).sum()

        learnt(step).backward()
        touched = 0
        for tap in Tap:
            if tap not in method.needs:
                continue
            for stride, x in zip(models.student.spec.channels[tap], getattr(step.student, tap), strict=True):
                if x.grad is not None:
                    within = torch.arange(x.shape[3]) * stride > 38  # whole cells, wherever their location is
                    assert not x.grad[..., within].any(), (tap, stride)
                    touched += int(x.grad.any())
        inside = step.student.grid.points[:, 0] > 40
        for name in self.reads:
            grad = getattr(step.student, name).grad
            if grad is not None:
                assert not grad[:, inside].any(), name
                touched += int(grad.any())
        assert touched
        step.batch.targets.ignore[:] = False  # without it something is learnt there
        if self.objects_alone:
            step.batch.targets.mask[:] = True
        again = replace(step, student=leaves(step.student))
        learnt(again).backward()
        there = [x.grad[..., 5:] for x in self.read(method, again) if x.grad is not None and x.shape[-1] == 8]
        assert self.reads or any(bool(grad.any()) for grad in there)

    def test_what_is_drawn_follows_from_seed_and_number(self) -> None:
        models = self.pair()
        method, batch = self.method(models), make_batch()
        state = torch.get_rng_state()

        def at(*draw: int) -> list[float]:
            return [float(v.detach()) for v in self.found(method, self.step(models, batch, *draw)).values()]

        first = at(3, 7)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(5)
        assert at(3, 7) == first
        assert (at(3, 8) != first) == (at(4, 7) != first) == self.draws

    def test_a_batch_in_parts_is_the_batch_at_once(self) -> None:
        """So it is over processes: each takes every n-th image, and gradients are averaged."""
        results = []
        for parts in (1, 2):
            models = self.pair()
            module = TeacherLosses(models.teacher, {self.kind.name: self.method(models)})
            step = TrainStep(models.student, nn.ModuleDict({"kd": module})).double()
            models.teacher.double()
            batch = make_batch(images=4)
            pieces = [batch.part(i, parts) for i in range(parts)]
            losses = gradients(step, pieces, Draw(1, 2), lambda loss: loss.backward(), lambda part, terms: terms)
            grads = {n: p.grad for n, p in step.named_parameters() if p.grad is not None}
            results.append({str(n): v for n, v in losses.items()} | grads)
        once, taken = results
        assert once.keys() == taken.keys()
        for name, value in once.items():
            torch.testing.assert_close(taken[name], value, rtol=1e-5, atol=1e-9, msg=name)

    def test_maps_are_weights_of_cells(self) -> None:
        models = self.pair()
        step = self.step(models, make_batch())
        for name, value in self.method(models).maps(step).items():
            assert value.shape[0] == 2, name
            assert value.ndim == 3, name
            assert (value >= 0).all(), name


def leaves(out: DenseOutput, factor: float = 1.0) -> DenseOutput:
    """The same output with a gradient of its own for every map (times a factor) and table."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_()

    maps = {f.name: tuple(leaf(m * factor) for m in getattr(out, f.name)) for f in fields(out) if f.name in set(Tap)}
    return replace(out, **maps, **{name: leaf(value) for name, value in predictions(out).items()})


def in_dtype(out: DenseOutput, dtype: torch.dtype) -> DenseOutput:
    """Maps and predictions in another dtype; boxes as they are, or in float64, and the grid stays."""
    maps = {
        f.name: tuple(m.detach().to(dtype) for m in getattr(out, f.name)) for f in fields(out) if f.name in set(Tap)
    }
    tables = {name: value.detach().to(dtype) for name, value in predictions(out).items() if name != "boxes"}
    boxes = out.boxes.detach().to(torch.promote_types(dtype, out.boxes.dtype))
    return replace(out, **maps, **tables, boxes=boxes)


def predictions(out: DenseOutput) -> dict[str, Tensor]:
    """{field: table}; a detector may have no quality."""
    return {name: getattr(out, name) for name in PREDICTIONS if getattr(out, name) is not None}


def whole_images() -> Batch:
    """Two images without ignore regions or padding."""
    batch = make_batch()
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    return batch


def half_ignored() -> Batch:
    """Two objects at the left, and everything at the right of 38 px to be ignored."""
    batch = make_batch(1, boxes=3)
    batch.targets.boxes[0] = torch.tensor([[2.0, 4, 26, 40], [8, 30, 30, 62], [38, 0, 64, 64]])
    batch.targets.mask[0], batch.targets.ignore[0] = torch.tensor([[True, True, False], [False, False, True]])
    return batch
