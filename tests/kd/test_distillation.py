"""The callback: gate, plan, factors, resume, warnings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kd.fakes import TinyDetector, make_batch, make_state, metrics
from tests.kd.test_base import Broken
from yoloxkd.assembly.recipes import resolve
from yoloxkd.engine.events import State
from yoloxkd.engine.gradients import ALL, TASK_LOSS, loss_gradients, trunk
from yoloxkd.engine.optim import warmup_steps
from yoloxkd.engine.step import TrainStep
from yoloxkd.errors import GateError, UserError
from yoloxkd.kd.base import KDConfig, Teacher
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.methods.fgd import FGDConfig
from yoloxkd.kd.methods.pgd import PGDConfig
from yoloxkd.types import TASK, LossName


def start(
    methods: dict[str, KDConfig] | None = None,
    teacher: TinyDetector | None = None,
    digest: str = "a" * 64,
    state: dict[str, Any] | None = None,
    student: TinyDetector | None = None,
    saved: dict[str, Any] | None = None,
    **keys: Any,
) -> tuple[Distill, State, list[str]]:
    torch.manual_seed(0)
    run, said = make_state(student or TinyDetector(4), **(state or {}))
    who = Teacher(teacher or TinyDetector(6), "teacher.pt", digest, 0.987)
    callback = Distill(who, methods or {"pgd": PGDConfig()}, **keys)
    if saved is not None:
        callback.load_state_dict(saved)
    callback.on_setup(run)
    return callback, run, said


def epoch(callback: Distill, state: State, steps: int = 4, training: bool = True) -> None:
    """Runs an epoch the way the engine does."""
    sums: dict[LossName, float] = {}
    state.detector.train()
    callback.on_epoch_start(state)
    for i in range(steps):
        state.batch = make_batch(seed=i)
        callback.on_batch_start(state)
        losses = TrainStep(state.detector, state.aux)(state.batch)
        state.losses = {name: loss.mean() for name, loss in losses.items()}
        callback.on_losses(state)
        if training:
            torch.stack(list(state.losses.values())).sum().backward()
        for name, value in state.losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        state.iteration += 1
        callback.on_step(state)
    state.epoch_losses = {k: v / steps for k, v in sums.items()}
    callback.on_epoch_end(state)
    state.epoch += 1


def test_setup_prints_the_plan_and_the_teacher_and_registers_the_losses() -> None:
    callback, state, said = start({"fgd": FGDConfig(), "pgd": PGDConfig()})
    text = "\n".join(said)
    assert "neck stride 8" in text
    assert "cls stride 16" in text
    assert "1x1 adapter" in text
    assert "98.7%" in text
    assert "AP 0.500" in text
    assert list(state.aux) == ["kd"]
    (record,) = callback.state_dict()["teachers"]
    assert record["digest"] == "a" * 64
    assert record["plan"]["strides"] == [8, 16]
    assert record["ap"] == 0.5
    callback.on_fit_start(state)
    epoch(callback, state)
    assert any("of the loss in epoch 1" in line and line.startswith("fgd:") for line in said)


def test_one_line_says_what_each_method_contributes() -> None:
    callback, state, said = start({"fgd": FGDConfig(), "pgd": PGDConfig()})
    callback.on_batch_start(state)
    names = state.aux["kd"].names
    each = {"fgd": 30.0, "pgd": 10.0}
    share = {name: each[name.source] / sum(n.source == name.source for n in names) for name in names}
    state.epoch_losses = {LossName(TASK, "cls"): 60.0, **share}
    callback.on_epoch_end(state)
    assert said[-1] == "fgd: 30, 30.0%, pgd: 10, 10.0% of the loss in epoch 1; labels 60.0%"


def test_a_poor_teacher_is_refused() -> None:
    seen: list[Any] = []

    def evaluate(model: Any, limit: int | None) -> dict[str, Any]:
        seen.append((model, limit))
        return metrics(0.01, ["cat", "dog", "bird"])

    teacher = TinyDetector(6)
    with pytest.raises(GateError, match=r"AP 0\.010.*teacher\.min_ap") as error:
        start(teacher=teacher, state={"evaluate": evaluate}, gate_images=7)
    assert error.value.exit_code == 3
    assert seen == [(teacher, 7)]
    start(state={"evaluate": evaluate}, min_ap=0.0)
    assert len(seen) == 1  # min_ap 0 does not evaluate


def test_a_nan_ap_is_refused() -> None:
    with pytest.raises(GateError):
        start(state={"evaluate": lambda model, limit: metrics(float("nan"), model.names)})


def test_a_teacher_of_other_classes_is_not_measured_but_said() -> None:
    _, _, said = start(teacher=TinyDetector(6, names=["ship"]), state={"evaluate": None})
    assert any("none of the student's classes" in line for line in said)


def test_no_common_stride_is_refused_before_anything_else() -> None:
    with pytest.raises(UserError, match="no stride in common"):
        start(teacher=TinyDetector(6, levels=(32,)))


def test_unknown_method_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'fgd'"):
        start({"fgdd": KDConfig()})


def test_a_method_without_a_term_is_refused() -> None:
    with pytest.raises(UserError, match="every term of fgd"):
        start({"fgd": FGDConfig.model_validate({"focal": False, "global": False})})


def test_resume_checks_the_teacher_and_restores_the_automatic_weight() -> None:
    first, _, _ = start()
    fixed = {"fixed": 3.5, "seen": 100, "task": torch.tensor(7.0), "own": torch.tensor(1.0)}
    saved = first.state_dict() | {"auto": {"pgd": fixed}}
    auto = {"pgd": PGDConfig(weight="auto")}
    callback, again, _ = start(auto, saved=saved, state={"evaluate": None})  # the gate was passed before
    callback.on_batch_start(again)
    assert again.aux["kd"].methods["pgd"].factor == 3.5
    assert callback.state_dict()["teachers"][0]["ap"] == 0.5
    assert callback.state_dict()["auto"] == {"pgd": fixed}
    with pytest.raises(UserError, match="not the file this run began with"):
        start(digest="b" * 64, saved=saved)


def test_checkpoint_of_the_losses_holds_adapters_and_no_teacher() -> None:
    _, state, _ = start()
    keys = list(state.aux.state_dict())
    assert any("adapters" in k for k in keys)
    assert not any("tower" in k or "backbone" in k for k in keys)


def test_automatic_weight_is_fixed_said_and_stored() -> None:
    cfg = PGDConfig(weight="auto", auto_share=0.5, auto_iterations=6)
    callback, state, said = start({"pgd": cfg})
    state.detector.requires_grad_(False)  # nothing learns: every epoch has the same losses
    epoch(callback, state, training=False)
    epoch(callback, state, training=False)
    fixed = callback.state_dict()["auto"]["pgd"]["fixed"]
    assert any(f"fixed at {fixed:.4g}" in line for line in said)
    epoch(callback, state, training=False)
    task = sum(v for k, v in state.epoch_losses.items() if k.source == TASK)
    own = sum(v for k, v in state.epoch_losses.items() if k.source != TASK)
    assert own == pytest.approx(0.5 * task, rel=0.05)


def test_a_measurement_goes_on_where_it_was_interrupted() -> None:
    """Whether the run stops in the middle of measuring or not, the weight that is fixed is the same to the last bit."""
    cfg = {"pgd": PGDConfig(weight="auto", auto_iterations=6)}
    whole, state, _ = start(cfg)
    epoch(whole, state)
    epoch(whole, state)
    first, stopped, _ = start(cfg)
    epoch(first, stopped)
    assert first.weights["pgd"].measuring
    second, resumed, _ = start(cfg, saved=first.state_dict(), state={"iteration": 4, "epoch": 1})
    resumed.detector.load_state_dict(stopped.detector.state_dict())
    resumed.aux.load_state_dict(stopped.aux.state_dict())
    epoch(second, resumed)
    assert not second.weights["pgd"].measuring
    assert second.weights["pgd"].fixed == whole.weights["pgd"].fixed
    assert resumed.epoch_losses == state.epoch_losses


def test_warmup_and_stop_reach_the_module() -> None:
    callback, state, said = start({"pgd": PGDConfig(warmup=1, stop_epoch=1)})
    callback.on_batch_start(state)
    assert state.aux["kd"].methods["pgd"].factor == 0.25
    epoch(callback, state)
    callback.on_batch_start(state)
    assert state.aux["kd"].methods["pgd"].factor == 0.0
    said.clear()
    epoch(callback, state)
    assert said == []  # off by plan: nothing to warn about


def test_zero_missing_and_overwhelming_terms_are_said() -> None:
    callback, state, said = start({"pgd": PGDConfig(warn_above=2.0)})
    callback.on_batch_start(state)
    names = state.aux["kd"].names
    state.epoch_losses = {LossName(TASK, "cls"): 1.0, **dict.fromkeys(names, 5.0), names[0]: 0.0}
    del state.epoch_losses[names[1]]
    callback.on_epoch_end(state)
    text = "\n".join(said)
    assert f"{names[0]} was exactly 0 throughout epoch 1" in text
    assert f"{names[1]} did not reach the loss in epoch 1" in text
    assert "times the task loss" in text


def test_a_term_that_stays_zero_is_said_once_and_again_after_it_was_not() -> None:
    callback, state, said = start({"pgd": PGDConfig()})
    callback.on_batch_start(state)
    names = state.aux["kd"].names

    def warned(value: float) -> bool:
        said.clear()
        state.epoch_losses = {LossName(TASK, "cls"): 1.0, **dict.fromkeys(names, 5.0), names[0]: value}
        callback.on_epoch_end(state)
        return any("exactly 0" in line for line in said)

    assert [warned(v) for v in (0.0, 0.0, 1.0, 0.0)] == [True, False, False, True]


def test_terms_that_are_not_finite_are_named_and_stop_the_run() -> None:
    callback, state, said = start({"fgd": FGDConfig(max_nonfinite=9)}, teacher=Broken(6))
    epoch(callback, state, steps=2)
    warned = [line for line in said if "was not finite" in line]
    assert any("fgd term fg at stride 8 (student map float32, teacher map float32)" in line for line in warned)
    with pytest.raises(GateError, match="max_nonfinite 9"):
        epoch(callback, state, steps=2)


def test_terms_that_were_not_finite_are_counted_on_after_a_resume() -> None:
    callback, state, _ = start({"fgd": FGDConfig(max_nonfinite=9)}, teacher=Broken(6))
    epoch(callback, state, steps=2)
    again, resumed, said = start(
        {"fgd": FGDConfig(max_nonfinite=9)},
        teacher=Broken(6),
        saved=callback.state_dict(),
        state={"evaluate": None},
    )
    again._check_finite(resumed)
    assert not any("was not finite" in line for line in said)  # it was said before the interruption
    with pytest.raises(GateError, match="max_nonfinite 9"):
        epoch(again, resumed, steps=2)
    assert any("fgd term fg at stride 8" in line and "in 2 step(s)" in line for line in said)


def test_inherit_says_what_it_took() -> None:
    student, teacher = TinyDetector(6), TinyDetector(6)
    _, _, said = start({"fgd": FGDConfig(inherit=True)}, teacher=teacher, student=student)
    assert any("inherited from the teacher" in line and "neck.0.0" in line for line in said)
    assert torch.equal(student.neck[0][0].weight, teacher.neck[0][0].weight)
    _, _, said = start({"fgd": FGDConfig(inherit=True)}, teacher=TinyDetector(6), student=TinyDetector(4))
    assert any("no layer" in line for line in said)


def test_self_distillation() -> None:
    """A teacher of the student's own architecture with other weights: no adapters, something to learn."""
    callback, state, _ = start(student=TinyDetector(6), teacher=TinyDetector(6))
    assert not any("adapters" in k for k in state.aux.state_dict())
    epoch(callback, state)
    assert all(v > 0 for k, v in state.epoch_losses.items() if k[:2] == ("pgd", "cls_attention"))


GRADIENTS = {"weight": "auto", "auto": "gradient", "auto_every": 2, "auto_iterations": 4}


def test_the_weight_by_gradients_is_the_ratio_of_norms_on_the_trunk() -> None:
    """The first step only measures, every second one does; after the warm-up it begins anew, and is fixed."""
    callback, state, said = start({"pgd": PGDConfig(**GRADIENTS, auto_share=0.25)})
    start_step = warmup_steps(state.recipe, state.iters_per_epoch)
    assert start_step == 4
    measured: list[tuple[float, float]] = []
    for i in range(9):
        state.batch = make_batch(seed=i)
        callback.on_batch_start(state)
        losses = TrainStep(state.detector, state.aux)(state.batch)
        state.losses = {name: loss.mean() for name, loss in losses.items()}
        unscaled = dict(state.losses)
        if measures := i % 2 == 0 and i < 8:
            norms = loss_gradients(unscaled, trunk(state.detector))
            measured.append((norms[TASK_LOSS].norm, norms[LossName("pgd", ALL)].norm))
        callback.on_losses(state)
        known = measured[:-1] if measures else measured  # a step's own gradients count from the next one on
        counted = known[2:] if len(known) > 2 else known
        expected = 0.25 * sum(t for t, _ in counted) / sum(k for _, k in counted) if counted else 0.0
        factor = state.aux["kd"].methods["pgd"].factor
        name = LossName("pgd", "cls_fg", 8)
        used = state.losses[name] / unscaled[name] if measures else factor
        assert float(torch.as_tensor(used).detach()) == pytest.approx(expected, rel=1e-4), i
        state.iteration += 1
    assert callback.weights["pgd"].fixed == pytest.approx(expected)
    assert [line for line in said if "fixed at" in line and "gradient on backbone and neck 0.25 of the task" in line]


def test_a_measurement_of_gradients_goes_on_where_it_was_interrupted() -> None:
    cfg = {"pgd": PGDConfig(**GRADIENTS)}
    whole, state, _ = start(cfg)
    first, stopped, _ = start(cfg)
    for _ in range(2):
        epoch(whole, state)
    epoch(first, stopped)
    second, resumed, _ = start(cfg, saved=first.state_dict(), state={"iteration": 4, "epoch": 1})
    resumed.detector.load_state_dict(stopped.detector.state_dict())
    resumed.aux.load_state_dict(stopped.aux.state_dict())
    epoch(second, resumed)
    assert whole.weights["pgd"].fixed is not None
    assert second.weights["pgd"].fixed == whole.weights["pgd"].fixed
    assert resumed.epoch_losses == state.epoch_losses


def test_a_compiled_student_cannot_have_its_gradients_measured() -> None:
    recipe = resolve(student="yolox-nano", sets={"engine.compile": True})
    with pytest.raises(UserError, match=r"kd\.auto gradient .* compiled model .* --set kd\.auto=loss"):
        start({"pgd": PGDConfig(**GRADIENTS)}, state={"recipe": recipe})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"auto": "gradient"}, "weight is a number: set weight to auto"),
        ({"weight": "auto", "auto_every": 5}, "auto_every belongs to auto gradient"),
    ],
)
def test_keys_of_a_measurement_that_is_not_made_are_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PGDConfig(**keys)
