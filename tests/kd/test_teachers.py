"""Several teachers: who answers for which object, whose terms are whose, and what a resumed run checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kd.fakes import TinyDetector, make_batch, make_state, metrics
from tests.kd.test_distillation import epoch
from tests.losses import distilled, step_of
from yoloxkd.engine.callbacks.progress import by_term
from yoloxkd.engine.events import State
from yoloxkd.errors import GateError, UserError
from yoloxkd.kd.base import Distiller, KDConfig, Teacher
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.methods.fgd import FGDConfig
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing, divide_classes
from yoloxkd.kd.teacher_check import known_ap
from yoloxkd.types import TASK, Tap

STUDENT = ("cat", "dog", "bird", "yak")


def run(
    teachers: list[Teacher],
    methods: dict[str, KDConfig],
    channels: int = 4,
    saved: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Distill, State, list[str]]:
    torch.manual_seed(0)
    state, said = make_state(TinyDetector(channels, names=STUDENT), **changes)
    callback = Distill(teachers, methods)
    if saved is not None:
        callback.load_state_dict(saved)
    callback.on_setup(state)
    return callback, state, said


def teacher(names: tuple[str, ...], letter: str, weight: float = 1.0, channels: int = 6) -> Teacher:
    torch.manual_seed(ord(letter))
    return Teacher(TinyDetector(channels, names=names), f"{letter}.pt", letter * 64, 1.0, weight)


def both() -> list[Teacher]:
    return [teacher(("dog", "ship"), "a", 1.0), teacher(("bird", "dog"), "b", 0.5, channels=8)]


def test_each_class_belongs_to_the_first_teacher_that_knows_it() -> None:
    student = TinyDetector(names=STUDENT)
    plans = divide_classes([Pairing.between(student, t.detector) for t in both()])
    assert plans[0].taught.tolist() == [True, True, False, True]  # dog, and what nobody knows
    assert plans[1].taught.tolist() == [False, False, True, False]
    assert plans[0].classes.tolist() == [-1, 0, -1, -1]
    alone = divide_classes([Pairing.between(student, both()[1].detector)])
    assert alone[0].taught.all()


def test_an_object_is_foreground_for_one_teacher_and_background_for_none() -> None:
    student = TinyDetector(names=STUDENT).eval()
    teachers = [t.detector.eval() for t in both()]
    plans = divide_classes([Pairing.between(student, t) for t in teachers])
    batch = make_batch(images=1, boxes=2)
    batch.targets.mask[:], batch.targets.ignore[:] = True, False
    batch.targets.boxes[0] = torch.tensor([[2.0, 2.0, 30.0, 30.0], [34.0, 34.0, 62.0, 62.0]])
    batch.targets.labels[0] = torch.tensor([1, 2])  # dog, bird
    found = []
    for plan, detector in zip(plans, teachers, strict=True):
        with torch.no_grad():
            out = detector(batch.images)
            weights, background = PGD(PGDConfig(), plan).regions(step_of(out, out, batch, detector))
        found.append((weights["cls"][0][0] > 0, background[0][0] > 0))
    (dog, plain), (bird, plain_too) = found
    assert dog[:4, :4].any()
    assert bird[4:, 4:].any()
    assert not dog[4:, 4:].any()
    assert not bird[:4, :4].any()
    assert torch.equal(plain, plain_too)
    assert not (plain & (dog | bird)).any()


def test_terms_of_all_teachers_are_named_weighted_and_trained() -> None:
    teachers = both()
    callback, state, said = run(teachers, {"fgd": FGDConfig(), "pgd": PGDConfig()})
    assert list(state.aux) == ["kd@1", "kd@2"]
    names = [name for module in callback.modules for name in module.names]
    assert {"fgd@1/fg/s8", "fgd@2/fg/s8", "pgd@2/cls_attention/s16"} <= {*map(str, names)}
    assert {*map(str, by_term(dict.fromkeys(names, 1.0)))} >= {"fgd@1/fg", "fgd@2/fg"}
    text = "\n".join(said)
    assert "teacher @2 of 2: b.pt, weight 0.5" in text
    assert "this teacher's: bird" in text
    state.batch = make_batch(classes=4)
    callback.on_batch_start(state)
    state.detector.eval()
    losses = [distilled(module, state.detector, state.batch) for module in state.aux.values()]
    other, twice, _ = run([teachers[0], replace(teachers[1], weight=1.0)], {"fgd": FGDConfig(), "pgd": PGDConfig()})
    twice.aux.load_state_dict(state.aux.state_dict())
    other.on_batch_start(twice)
    full = [distilled(module, state.detector, state.batch) for module in twice.aux.values()]
    for name, value in losses[0].items():
        assert torch.equal(value, full[0][name])
    for name, value in losses[1].items():
        torch.testing.assert_close(value, full[1][name] / 2)
    torch.stack([v for part in losses for v in part.values()]).sum().backward()
    assert all(p.grad is not None for p in state.aux.parameters())


def test_an_epoch_reports_each_method_once_and_the_automatic_weight_covers_all_teachers() -> None:
    callback, state, said = run(both(), {"pgd": PGDConfig(weight="auto", auto_iterations=4, auto_share=0.5)})
    state.detector.requires_grad_(False)
    epoch(callback, state, training=False)
    said.clear()
    epoch(callback, state, training=False)
    assert sum(line.startswith("pgd: ") for line in said) == 1
    task = sum(v for k, v in state.epoch_losses.items() if k.source == TASK)
    own = sum(v for k, v in state.epoch_losses.items() if k.source in ("pgd@1", "pgd@2"))
    assert own == pytest.approx(0.5 * task, rel=0.05)


def test_resume_checks_every_teacher() -> None:
    callback, _, _ = run(both(), {"pgd": PGDConfig()})
    saved = callback.state_dict()
    assert [t["source"] for t in saved["teachers"]] == ["a.pt", "b.pt"]
    run(both(), {"pgd": PGDConfig()}, saved=saved, evaluate=None)
    changed = [both()[0], replace(both()[1], digest="c" * 64)]
    with pytest.raises(UserError, match=r"b\.pt is not the file this run began with"):
        run(changed, {"pgd": PGDConfig()}, saved=saved, evaluate=None)


def test_the_gate_asks_each_teacher_only_for_what_it_knows() -> None:
    """Classes a teacher does not know have AP 0; they must not drag it below the threshold, nor others lift it."""
    truth = {"a": {"dog": 0.4}, "b": {"dog": 0.0, "bird": 0.01}}
    teachers = both()

    def evaluate(model: Any, limit: int | None) -> dict[str, Any]:
        letter = "a" if model is teachers[0].detector else "b"
        per_class = {n: {"AP": truth[letter].get(n, 0.0), "AP50": 0.0} for n in STUDENT}
        return {"AP": sum(c["AP"] for c in per_class.values()) / 4, "per_class": per_class}

    with pytest.raises(GateError, match=r"teacher b\.pt reaches AP 0\.005 .* over the 2 of 4 classes"):
        run(teachers, {"pgd": PGDConfig()}, evaluate=evaluate)
    truth["b"]["dog"] = 0.5
    callback, _, said = run(teachers, {"pgd": PGDConfig()}, evaluate=evaluate)
    assert [record.ap for record in callback.records] == pytest.approx([0.4, 0.255])
    assert any("a.pt" in line and "AP 0.400" in line and "1 of 4 classes" in line for line in said)


def test_the_gate_spells_classes_as_the_student_does() -> None:
    seen: list[list[str]] = []

    def evaluate(model: Any, limit: int | None) -> dict[str, Any]:
        seen.append(list(model.names))
        return metrics(0.5, STUDENT)

    one = teacher(("Dog", "sea-ship", "BIRD"), "a")
    run([one], {"pgd": PGDConfig()}, evaluate=evaluate)
    assert seen == [["dog", "sea-ship", "bird"]]
    assert one.detector.names == ["Dog", "sea-ship", "BIRD"]


def test_known_ap_leaves_out_classes_that_do_not_occur() -> None:
    plan = Pairing.between(TinyDetector(names=STUDENT), both()[1].detector)
    found = metrics(0.3, STUDENT)
    found["per_class"]["dog"]["AP"] = -1.0
    assert known_ap(found, plan) == pytest.approx(0.3)
    found["per_class"]["bird"]["AP"] = -1.0
    assert known_ap(found, plan) != known_ap(found, plan)  # NaN: nothing to measure, which is no pass


def test_every_distiller_is_made_for_each_teacher() -> None:
    callback, _, _ = run(both(), {"fgd": FGDConfig()})
    made: list[Distiller] = [module.methods["fgd"].distiller for module in callback.modules]
    assert [m.pairing.channels(Tap.NECK, m.pairing.levels[0]) for m in made] == [(4, 6), (4, 8)]
