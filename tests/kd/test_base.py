"""The teacher stays as it is and out of sight; terms that are not finite are left out and counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kd.fakes import TinyDetector, make_batch, tiny_yolox
from tests.losses import distilled, means, task
from yoloxkd.engine.step import TrainStep
from yoloxkd.kd import DISTILLERS, teacher_losses
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.methods.fgd import FGD, FGDConfig
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.types import DenseOutput, LossName


def build(student_channels: int = 4) -> tuple[TinyDetector, TinyDetector, TeacherLosses]:
    torch.manual_seed(0)
    student, teacher = TinyDetector(student_channels), TinyDetector(6)
    plan = Pairing.between(student, teacher)
    return student, teacher, TeacherLosses(teacher, {"fgd": FGD(FGDConfig(), plan), "pgd": PGD(PGDConfig(), plan)})


def factors(module: TeacherLosses, **factors: float | Tensor) -> None:
    for name, factor in factors.items():
        module.methods[name].factor = factor


def train(student: TinyDetector, module: TeacherLosses, steps: int = 3) -> dict[str, Tensor]:
    student.train()
    module.train()
    optimizer = torch.optim.SGD([*student.parameters(), *module.parameters()], lr=0.01)
    losses: dict[str, Tensor] = {}
    for i in range(steps):
        batch = make_batch(seed=i)
        out = student(batch.images)
        losses = task(student, out, batch.targets) | distilled(module, student, batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return losses


def test_the_teacher_is_bit_identical_after_training() -> None:
    student, teacher, module = build()
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()  # somebody forgot
    train(student, module)
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_teacher_is_outside_the_module_tree() -> None:
    student, teacher, module = build()
    own = {id(p) for p in module.parameters()} | {id(b) for b in module.buffers()}
    assert not own & {id(t) for t in [*teacher.parameters(), *teacher.buffers()]}
    assert all(key.startswith("distillers.") for key in module.state_dict())
    assert not any(m is teacher for m in module.modules())
    module.train()
    assert not teacher.training
    assert copy.deepcopy(module).teacher is teacher
    _, _, other = build()
    other.load_state_dict(module.state_dict())
    train(student, other, 1)


def test_names_cover_every_method_term_and_level() -> None:
    student, _, module = build()
    losses = train(student, module, 1)
    found = [name for name in losses if "/" in name]
    assert found == [*map(str, module.names)]
    assert {"fgd/fg/s8", "fgd/global/s16", "pgd/cls_attention/s8", "pgd/reg_fea/s16"} <= set(found)
    assert all(p.grad is not None for p in module.parameters())


def test_factors_scale_the_losses_and_zero_turns_a_method_off() -> None:
    student, teacher, module = build()
    student.eval()
    batch = make_batch()
    calls: list[int] = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    full = distilled(module, student, batch)
    factors(module, fgd=0.25, pgd=torch.tensor(0.5))
    part = distilled(module, student, batch)
    for name, value in full.items():
        torch.testing.assert_close(part[name], value * (0.25 if name.startswith("fgd") else 0.5))
    torch.testing.assert_close(
        module.methods["fgd"].loss, sum(v for k, v in full.items() if k.startswith("fgd/")).detach()
    )
    assert len(calls) == 2
    factors(module, fgd=0.0, pgd=0.0)
    off = distilled(module, student, batch)
    assert len(calls) == 2  # the teacher is not run for nothing
    assert list(off) == list(full)
    assert all(float(v.detach()) == 0.0 for v in off.values())
    torch.stack(list(off.values())).sum().backward()
    assert all(p.grad is not None for p in module.parameters())  # DDP waits for every parameter


class Broken(TinyDetector):
    """Its finest map is not finite at one place."""

    value = float("inf")

    def network(self, x: Tensor) -> DenseOutput:
        out = super().network(x)
        bad = out.features[0].clone()
        bad[0, 0, 2, 2] = self.value
        out.features = (bad, *out.features[1:])
        return out


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_terms_that_are_not_finite_are_left_out(value: float) -> None:
    torch.manual_seed(0)
    student, teacher = TinyDetector(4), Broken(6)
    teacher.value = value
    plan = Pairing.between(student, teacher)
    module = TeacherLosses(teacher, {"fgd": FGD(FGDConfig(), plan), "pgd": PGD(PGDConfig(), plan)})
    batch = make_batch()
    student.train()
    for _ in range(2):
        student.zero_grad()
        module.zero_grad()
        losses = distilled(module, student, batch)
        torch.stack(list(losses.values())).sum().backward()
    counts = dict(zip(map(str, module.names), module.nonfinite.counts.tolist(), strict=True))
    assert counts["fgd/fg/s8"] == counts["fgd/global/s8"] == 2
    assert sum(v for k, v in counts.items() if not (k.startswith("fgd/") and k.endswith("/s8"))) == 0
    assert all(v.isfinite() for v in losses.values())
    assert float(losses["fgd/fg/s8"].detach()) == 0.0
    assert float(losses["fgd/fg/s16"].detach()) > 0.0
    for name, p in [*student.named_parameters(), *module.named_parameters()]:
        assert p.grad is None or p.grad.isfinite().all(), name
    assert student.neck[0][0].weight.grad.abs().sum() > 0  # what is finite still teaches
    assert module.describe(LossName("fgd", "fg", 8)) == (
        "fgd term fg at stride 8 (student map float32, teacher map float32)"
    )


def test_finite_gradients_pass_untouched() -> None:
    """The gate is open unless a term of the step was left out: then a NaN of another source stays visible."""
    student, _, module = build()
    batch = make_batch()
    student.train()
    losses = distilled(module, student, batch)
    (torch.stack(list(losses.values())).sum() * float("nan")).backward()
    assert student.neck[0][0].weight.grad.isnan().any()


def test_bfloat16_autocast_gives_float32_terms() -> None:
    student, _, module = build()
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distilled(module, student, batch)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    assert module.methods["pgd"].precisions[16] == "student map bfloat16, teacher map bfloat16"


def test_the_teacher_looks_once_a_step_and_before_the_student_holds_anything() -> None:
    student, teacher, module = build()
    order: list[str] = []
    for model, name in ((student, "student"), (teacher, "teacher")):
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    step = TrainStep(student, torch.nn.ModuleDict({"kd": module})).train()
    first = step(make_batch())
    assert order == ["teacher", "student"]
    factors(module, fgd=1.0, pgd=0.0)
    order.clear()
    assert step(make_batch(seed=1)).keys() == first.keys()
    assert order == ["teacher", "student"]
    factors(module, fgd=0.0, pgd=0.0)
    order.clear()
    step(make_batch())
    assert order == ["student"]


def test_each_batch_meets_its_own_teacher_output() -> None:
    """Looking first gives what running the teacher afterwards gives, batch after batch."""
    student, _, module = build()
    student.eval()
    step = TrainStep(student, torch.nn.ModuleDict({"kd": module}))
    for seed in (0, 1):
        batch = make_batch(seed=seed)
        found, plain = means(step(batch)), distilled(module, student, batch)
        for name, value in plain.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("frs", {"alpha": 0}),
        ("pgd", {"gamma": 0, "delta": 0}),
        ("gid", {"alpha": 0, "relation": 0}),
        ("chen", {"gamma": 0}),
        ("crosskd", {"alpha": 0, "gamma": 0}),
    ],
)
def test_adapters_of_terms_without_weight_stay_in_the_graph_beside_other_processes(
    name: str, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP waits for the gradient of every parameter."""
    student, teacher = tiny_yolox(1), tiny_yolox(2, width=0.0625)
    kind = DISTILLERS[name]
    config = kind.Config.model_validate(kd_defaults(name, "yolox") | keys)
    losses = TeacherLosses(teacher, {name: kind(config, Pairing.between(student, teacher))})
    step = TrainStep(student, nn.ModuleDict({"kd": losses}))

    def without_gradient(processes: int) -> list[str]:
        monkeypatch.setattr(teacher_losses, "world_size", lambda: processes)
        step.zero_grad()
        torch.stack([*means(step(make_batch(size=64))).values()]).sum().backward()
        return [key for key, p in losses.named_parameters() if p.requires_grad and p.grad is None]

    assert without_gradient(1)
    assert not without_gradient(2)
