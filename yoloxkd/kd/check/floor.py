"""The loss that a perfect student, the teacher itself, still pays because its batch norms use the statistics of a batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from yoloxkd.engine.step import StudentPass
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import KDConfig
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.kd.rescaled_teacher import RescaledTeacher
from yoloxkd.kd.teacher_losses import TeacherLosses
from yoloxkd.types import Batch, Draw, LossName, Targets


@torch.no_grad()
def batch_norm_floor(
    module: TeacherLosses, methods: Mapping[str, KDConfig], batches: Sequence[Batch], seed: int
) -> dict[LossName, float]:
    """Each loss, before its factor, of a copy of the teacher in training mode under the teacher, mean over the batches.

    What the copy pays in evaluation mode is taken off: a method whose own blocks are untrained compares unlike things.
    Nothing where the teacher sees the images at another scale, for then no student of its weights is perfect.
    """
    teacher = module.teacher
    if isinstance(teacher, RescaledTeacher):
        return {}
    plan = next(iter(module.methods.values())).distiller.pairing
    perfect = copy.deepcopy(teacher)
    pairing = _with_itself(plan)
    state = torch.get_rng_state()  # a method's own blocks start from random weights
    losses = TeacherLosses(
        teacher,
        {name: DISTILLERS[name](cfg, pairing) for name, cfg in methods.items()},
        tag=module.tag,
        weight=module.weight,
    ).to(batches[0].images.device)
    torch.set_rng_state(state)
    out: dict[LossName, float] = dict.fromkeys(losses.names, 0.0)
    for sign, training in ((-1, False), (1, True)):  # training mode last: it moves the running statistics
        perfect.train(training)
        for number, batch in enumerate(batches):
            draw = Draw(seed, number)
            teacher_batch = replace(batch, targets=_relabeled(batch.targets, plan))
            outputs = perfect(batch.images)
            match = perfect.assign(outputs, _of_known_classes(teacher_batch.targets, len(plan.teacher.names)), draw)
            for name, loss in losses(StudentPass(perfect, outputs, teacher_batch, match, draw)).items():
                out[name] += sign * float(loss.mean()) / len(batches)
    return {name: max(0.0, value) for name, value in out.items()}


def _with_itself(plan: Pairing) -> Pairing:
    """The plan of a teacher that teaches itself what it teaches the student.

    Its classes have one more: the objects of a class that it does not know.
    """
    n = len(plan.teacher.names)
    taught = torch.zeros(n + 1, dtype=torch.bool)
    for is_taught, at in zip(plan.taught.tolist(), plan.classes.tolist(), strict=True):
        taught[at if at >= 0 else n] |= is_taught
    return replace(
        plan,
        levels=tuple(LevelPair(level.stride, level.teacher, level.teacher) for level in plan.levels),
        student=plan.teacher,
        classes=torch.cat([torch.arange(n), torch.tensor([-1])]),
        taught=taught,
    )


def _relabeled(targets: Targets, plan: Pairing) -> Targets:
    """The labels in the teacher's classes; the number of its classes where it has none."""
    labels = plan.classes.to(targets.labels.device)[targets.labels]
    return replace(targets, labels=torch.where(labels >= 0, labels, len(plan.teacher.names)))


def _of_known_classes(targets: Targets, classes: int) -> Targets:
    """The objects that the teacher has a class for."""
    has_class = targets.labels < classes
    return replace(targets, labels=targets.labels.where(has_class, 0), mask=targets.mask & has_class)
