"""Check a distillation before it is run: teachers, pairing, gradients, floor, and a verdict."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from yoloxkd.assembly.models import load_student
from yoloxkd.assembly.run import fetch_weights, prepare
from yoloxkd.config.recipe import Recipe
from yoloxkd.config.without_folders import distinct_names
from yoloxkd.engine.callback_list import CallbackList
from yoloxkd.engine.device import settings
from yoloxkd.engine.events import State
from yoloxkd.engine.loop import TrainLoop
from yoloxkd.engine.step import TrainStep
from yoloxkd.errors import GateError, UserError
from yoloxkd.kd.check.floor import batch_norm_floor
from yoloxkd.kd.check.measure import StudentMeasured, measure_student
from yoloxkd.kd.check.verdict import Finding, find, level_shares_of_objects, verdict
from yoloxkd.kd.distillation import Distill
from yoloxkd.kd.pairing import Pairing
from yoloxkd.kd.rescaled_teacher import RescaledTeacher, unwrapped
from yoloxkd.kd.teacher_check import known_ap, spelled_as_the_student
from yoloxkd.types import Batch, LossName

MOST_IMAGES = 16  # of a batch here: so that four of them take two minutes on two cores
EQUAL = 1e-6  # AP: rounding
SCALES = (0.5, 1.0, 2.0)
SCALE_IMAGES = 50
NOWHERE = Path(os.devnull) / "kd-check"  # no run's folder: nothing is written


@dataclass(frozen=True, slots=True)
class KDCheck:
    """What distilling as set would do.

    Attributes:
        teachers: {source: AP (0 to 1) in the classes it knows, or None where `teacher.min_ap` is 0}
        plan: rows of the pairing plan, each teacher's: what, student, teacher, how they are brought together
        images, batches: of each measured batch, and how many
        students: the student at its start, then at the checkpoint if one was given
        student_ap: AP of the checkpoint in the same classes, on the images that the teacher was measured on; None: none
            was given
        floor: {loss: what a perfect student would pay, before the factor}; empty where it has no meaning
        objects: {stride: share of the objects whose size is that level's}
        findings: the worst first
    """

    teachers: dict[str, float | None]
    plan: list[list[str]]
    images: int
    batches: int
    students: list[StudentMeasured]
    student_ap: float | None
    floor: dict[LossName, float]
    objects: dict[int, float]
    findings: list[Finding]

    @property
    def harm(self) -> bool:
        """Whether distilling as set would make the student worse."""
        return any(finding.harm for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In words, with the one setting to change."""
        return verdict(self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        students = [
            {
                "weights": one.weights,
                "factors": dict(one.factors),
                "losses": {
                    str(name): {"loss": g.loss, "loss_share": one.loss_share(name)}
                    | {"gradient_norm": g.norm, "gradient_share": g.share, "cosine": g.cosine}
                    for name, g in one.gradients.items()
                },
                "concentration": [asdict(each) for each in one.concentration],
            }
            for one in self.students
        ]
        return {
            "teachers": dict(zip(distinct_names(list(self.teachers)), self.teachers.values(), strict=True)),
            "plan": self.plan,
            "images": self.images,
            "batches": self.batches,
            "students": students,
            "student_ap": self.student_ap,
            "floor": {str(name): value for name, value in self.floor.items()},
            "objects": {str(stride): share for stride, share in self.objects.items()},
            "findings": [asdict(finding) for finding in self.findings],
            "harm": self.harm,
            "verdict": self.verdict,
        }


def check_distillation(
    recipe: Recipe, *, checkpoint: str | None = None, batches: int = 4, console: Console | None = None
) -> KDCheck:
    """Measure a recipe's distillation on its first training batches; nothing is trained and nothing written.

    Args:
        recipe: resolved, with teacher and method.
        checkpoint: weights of the same student, at which everything is measured once more.
        batches: training batches, of `train.batch` images, 16 at most.
        console: for what a run says while it is prepared; None: quiet.

    Raises:
        GateError: a teacher is refused (`teacher.min_ap`).
        UserError: there is nothing to check, the pair or the data cannot be used, or the teacher knows no class of the data.
    """
    if not recipe.kd or not recipe.teacher.models:
        raise UserError("there is no distillation to check: give --teacher NAME|FILE and --kd METHOD")
    recipe = _small(recipe)
    fetch_weights(recipe)
    loop = prepare(recipe, NOWHERE, console=console or Console(quiet=True))
    state = loop.state
    distill = next(callback for callback in state.callbacks if isinstance(callback, Distill))
    state.callbacks = CallbackList([distill])
    with settings(recipe.engine, state.device):
        _set_up(loop, distill)
        first_batches = _batches(loop, batches)
        step = loop.stepper.step_module
        assert isinstance(step, TrainStep)  # one process
        seed, student_ap = recipe.train.seed, None
        students = [measure_student(step, distill, first_batches, seed=seed, weights="start")]
        if checkpoint is not None:
            report = load_student(state.detector, checkpoint)
            if not report.complete:
                raise UserError(
                    f"--checkpoint {checkpoint} is not of this student ({report.describe()}); give weights of it"
                )
            student_ap = known_ap(state.evaluate(state.detector, recipe.teacher.gate_images), _pairing(distill))
            students.append(measure_student(step, distill, first_batches, seed=seed, weights=checkpoint))
        floor: dict[LossName, float] = {}
        for module in distill.modules:
            floor |= batch_norm_floor(module, distill.methods, first_batches, seed)
    objects = level_shares_of_objects(first_batches, [level.stride for level in _pairing(distill).levels])
    images = len(first_batches[0].images)
    aps = {record.source: record.ap for record in distill.records}
    findings = find(students, distill.methods, floor, objects, images)
    return KDCheck(
        teachers=aps,
        plan=[row for record in distill.records for row in record.table],
        images=images,
        batches=len(first_batches),
        students=students,
        student_ap=student_ap,
        floor=floor,
        objects=objects,
        findings=[*_worse_teacher(aps, student_ap, checkpoint), *findings],
    )


def _small(recipe: Recipe) -> Recipe:
    """The recipe with one batch norm's batch of each step, of few images, in full precision and in this process."""
    train, images = recipe.train, max(1, recipe.train.batch // recipe.train.accumulate)
    train = train.model_copy(update={"batch": min(images, MOST_IMAGES), "accumulate": 1, "measure_batch": False})
    engine = recipe.engine.model_copy(update={"workers": 0, "compile": False, "amp": "off", "cache": "off"})
    return recipe.model_copy(update={"train": train, "engine": engine})


def _set_up(loop: TrainLoop, distill: Distill) -> None:
    """Pair, and check the teachers."""
    state = loop.state
    try:
        loop.set_up()
    except GateError as error:
        raise _scale_hint(error, state, distill) from error
    if not any(method.terms for module in distill.modules for method in module.distillers.values()):
        raise UserError(
            f"--kd {next(iter(distill.methods))} gives labels and has no loss, so there is no gradient to compare"
        )
    pairing = _pairing(distill)
    if not pairing.known_classes and state.recipe.teacher.min_ap > 0:
        raise UserError(
            f"the teacher {distill.teachers[0].source} knows none of the classes {', '.join(pairing.student.names[:6])}, so its AP "
            "cannot be measured; choose another, name its classes by teacher.names, or check it all the same with --set "
            "teacher.min_ap=0"
        )


def _pairing(distill: Distill) -> Pairing:
    return next(iter(distill.modules[0].methods.values())).distiller.pairing


def _scale_hint(error: GateError, state: State, distill: Distill) -> GateError:
    """The refusal, with the scale at which the teacher is better, if there is one."""
    recipe = state.recipe
    inner = unwrapped(distill.teachers[0].detector)
    best, at = recipe.teacher.min_ap, 0.0
    for scale in SCALES:
        detector = inner if scale == 1 else RescaledTeacher(inner, scale)
        pairing = Pairing.between(state.detector, detector)
        if scale == recipe.teacher.scale or not pairing.known_classes:
            continue
        with spelled_as_the_student(detector, pairing):
            ap = known_ap(state.evaluate(detector, min(SCALE_IMAGES, recipe.teacher.gate_images)), pairing)
        if ap > best:
            best, at = ap, scale
    if not at:
        return error
    return GateError(f"{error}. At another size of its input it reaches AP {best:.3f}: --set teacher.scale={at:g}")


def _batches(loop: TrainLoop, number: int) -> list[Batch]:
    """The first batches of the run, going on with its second epoch where the first is shorter."""
    out: list[Batch] = []
    epoch, loader, device = 0, loop.loader, loop.state.device
    while len(out) < number:
        loader.set_epoch(epoch, loop.schedule.strong(epoch))
        for batch in loader:
            out.append(batch.to(device))
            if len(out) == number:
                break
        epoch += 1
    if not any(bool(batch.targets.mask.any()) for batch in out):
        raise UserError(
            f"none of the {sum(len(b.images) for b in out)} training images that were drawn shows an object, so nothing can be "
            "compared; take more by --batches, or larger ones by --batch"
        )
    return out


def _worse_teacher(aps: dict[str, float | None], student_ap: float | None, checkpoint: str | None) -> Sequence[Finding]:
    """A teacher that is no better than the checkpoint."""
    teacher_aps = [ap for ap in aps.values() if ap is not None]
    if student_ap is None or not teacher_aps or max(teacher_aps) > student_ap + EQUAL:
        return []
    what = (
        f"the student at {checkpoint} has AP {student_ap:.3f}, and the best teacher has {max(teacher_aps):.3f}: choose "
        "a better one"
    )
    return [Finding(True, what, "", 1.0)]
