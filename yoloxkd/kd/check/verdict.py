"""What the measured numbers mean for the run: findings in words, each with the one setting that helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from yoloxkd.engine.gradients import ALL
from yoloxkd.kd.base import KDConfig
from yoloxkd.kd.check.measure import StudentMeasured
from yoloxkd.types import Batch, LossName

# Bounds on the share, a method's gradient over the task's. Measured with YOLOX on BCCD: 0.3 (FGD) and 0.7 (PGD) at the start of
# runs that gained, 2.0 for a trained student whose run still gained, 7 for PGD with weight 1, which taught nothing.
DROWNS, LOUD, WANTED, QUIET = 4.0, 1.5, 0.5, 0.03
AGAINST = -0.3
"""Cosine with the task's gradient; in the runs that gained it was between -0.1 and 0.1."""
LEVEL_GAP = 0.5
"""A level's part in the gradient above its part in the objects."""
BOXES_ABSENT, BOXES_WANTED = 0.05, 0.3
"""Of a method's gradient. PGD's box towers made 0.03 on BCCD; with ten times the weight two one-seed runs ended with better boxes."""
FEW_CHANNELS = 0.5
"""What a twentieth of the channels carries; 0.05 where all carry alike."""
FLOOR, FLOOR_HARM = 0.1, 0.5
"""Of the student's loss at its start. 0.14 was measured for PGD at 4 images a step, in a run that gained. Half of it noise does
harm where the method is louder than the labels."""
OBJECT_CELLS = 8
"""Side of a level's objects in its strides: the anchors of RetinaNet and ATSS."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the run that should be changed.

    Attributes:
        harm: distilling like this makes the student worse than training without
        what: in words, with its numbers
        setting: what to change, as `--set` takes it; empty: another teacher, or nothing to set
        severity: how far beyond its bound, 1 and more
    """

    harm: bool
    what: str
    setting: str
    severity: float


def find(
    students: Sequence[StudentMeasured],
    methods: Mapping[str, KDConfig],
    floor: Mapping[LossName, float],
    objects: Mapping[int, float],
    images: int,
) -> list[Finding]:
    """Everything that stands out, the worst first.

    Args:
        students: the student at its start, then at checkpoints
        methods: {method: its keys}
        floor: of each loss, before its factor
        objects: {stride: share of the ground truth whose size is that level's}
        images: of a batch norm's batch
    """
    out: list[Finding] = []
    for student in students:
        for source in dict.fromkeys(n.source for n in student.gradients if n.source.partition("@")[0] in methods):
            method = source.partition("@")[0]
            key = "kd" if len(methods) == 1 else f"kd.{method}"
            out += _strength(student, source, key, student.factors[method])
            out += _levels(student, source, key, methods[method], objects)
            out += _boxes(student, source, key, methods[method])
            out += _channels(student, source, key, methods[method])
    for source in dict.fromkeys(name.source for name in floor):
        out += _floor(floor, students[0], source, images)
    return sorted(out, key=lambda finding: (not finding.harm, -finding.severity))


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence or two: whether to distil like this, and the one setting to change."""
    if not findings:
        return "Nothing stands out: the run can be started as it is."
    worst = findings[0]
    remedy = f" Change one setting: --set {worst.setting}" if worst.setting else ""
    if worst.harm:
        return f"Distilling as set would do harm: {worst.what}.{remedy}"
    return f"Distilling as set does no harm by these numbers, and could teach better: {worst.what}.{remedy}"


def floor_share(floor: Mapping[LossName, float], student: StudentMeasured, source: str) -> float:
    """The floor of a method as a share of what the student pays."""
    floor_loss = sum(value for name, value in floor.items() if name.source == source)
    paid = student.gradients[LossName(source, ALL)].loss
    return floor_loss * student.factors[source.partition("@")[0]] / paid if paid > 0 else 0.0


def level_shares_of_objects(batches: Sequence[Batch], strides: Sequence[int]) -> dict[int, float]:
    """{stride: share of the objects whose side, the root of their area, is nearest to 8 strides of that level}."""
    counts = torch.zeros(len(strides))
    sides = torch.tensor([float(OBJECT_CELLS * stride) for stride in strides]).log()
    for batch in batches:
        boxes = batch.targets.boxes[batch.targets.mask].cpu()
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        nearest = (area.clamp(min=1.0).log()[:, None] / 2 - sides).abs().argmin(1)
        counts += torch.bincount(nearest, minlength=len(strides))
    return dict(zip(strides, (counts / counts.sum().clamp(min=1)).tolist(), strict=True))


def _strength(student: StudentMeasured, source: str, key: str, factor: float) -> Iterator[Finding]:
    whole = student.gradients[LossName(source, ALL)]
    at = _at(student)
    where = f"the gradient of {source} on backbone and neck is {whole.share:.2g} times the task's {at}"
    weight = f"{key}.weight={factor * WANTED / whole.share:.2g}" if whole.share > 0 else f"{key}.weight=auto"
    if whole.share >= LOUD:
        harm = whole.share >= DROWNS
        yield Finding(
            harm, f"{where}: it {'drowns' if harm else 'is louder than'} the labels", weight, whole.share / LOUD
        )
    if whole.share <= QUIET:
        yield Finding(False, f"{where}: it teaches next to nothing", weight, QUIET / max(whole.share, 1e-3))
    if whole.cosine <= AGAINST and whole.share > QUIET:
        what = f"the gradient of {source} points against the task's {at} (cosine {whole.cosine:.2f})"
        yield Finding(whole.share >= WANTED, what, f"{key}.weight={factor / 10:.2g}", whole.cosine / AGAINST)


def _levels(
    student: StudentMeasured, source: str, key: str, cfg: KDConfig, objects: Mapping[int, float]
) -> Iterator[Finding]:
    """For methods that weigh their levels."""
    level_weights: list[float] | None = getattr(cfg, "level_weights", None)
    gradients = {stride: student.gradients.get(LossName(source, ALL, stride)) for stride in objects}
    norms = {stride: one.norm for stride, one in gradients.items() if one is not None and one.norm > 0}
    if level_weights is None or len(norms) < len(objects):
        return
    whole = sum(norms.values())
    stride, gap = max(((s, norm / whole - objects[s]) for s, norm in norms.items()), key=lambda pair: pair[1])
    if gap >= LEVEL_GAP:
        mean = whole / len(norms)
        weights = [f"{w * mean / norm:.2g}" for w, norm in zip(level_weights, norms.values(), strict=False)]
        yield Finding(
            False,
            f"{norms[stride] / whole:.0%} of the gradient of {source} {_at(student)} comes from stride {stride}, the level of "
            f"{objects[stride]:.0%} of the objects",
            f"'{key}.level_weights=[{', '.join(weights)}]'",
            gap / LEVEL_GAP,
        )


def _boxes(student: StudentMeasured, source: str, key: str, cfg: KDConfig) -> Iterator[Finding]:
    """For methods that distil the box towers beside others, with a weight of their own."""
    whole = student.gradients[LossName(source, ALL)].norm
    one = student.gradients.get(LossName(source, "reg_fea"))
    branches: list[str] = getattr(cfg, "branches", [])
    if one is None or len(branches) < 2 or not 0 < one.norm < BOXES_ABSENT * whole:
        return
    alpha, gamma = getattr(cfg, "alpha", 0.0), getattr(cfg, "gamma", None)
    now = 1.6 * alpha if gamma is None else gamma
    what = f"the box towers make {one.norm / whole:.1%} of the gradient of {source} {_at(student)}, so they are hardly distilled"
    severity = min(BOXES_ABSENT * whole / one.norm, 1.5)
    yield Finding(False, what, f"{key}.gamma={now * BOXES_WANTED * whole / one.norm:.2g}", severity)


def _channels(student: StudentMeasured, source: str, key: str, cfg: KDConfig) -> Iterator[Finding]:
    """For methods with a temperature: the map with most of the loss that lies on few channels."""
    maps = [one for one in student.concentration if one.source == source]
    if not maps or not hasattr(cfg, "tau"):
        return
    one = max(maps, key=lambda each: each.share)
    if one.channel_share >= FEW_CHANNELS:
        what = (
            f"{one.top_channels} of {one.channels} channels carry {one.channel_share:.0%} of what {source} compares on the "
            f"{one.tap} maps at stride {one.stride} {_at(student)}"
        )
        yield Finding(False, what, f"{key}.tau={3 * cfg.tau:.2g}", one.channel_share / FEW_CHANNELS)


def _floor(floor: Mapping[LossName, float], start: StudentMeasured, source: str, images: int) -> Iterator[Finding]:
    share = floor_share(floor, start, source)
    if share >= FLOOR:
        what = (
            f"with batch norms on {images} images a step even a perfect student would pay {share:.0%} of what the student pays "
            f"{source} at its start"
        )
        harm = share >= FLOOR_HARM and start.gradients[LossName(source, ALL)].share >= LOUD
        yield Finding(harm, what, f"train.batch={4 * images}", share / FLOOR)


def _at(student: StudentMeasured) -> str:
    return "at the student's start" if student.weights == "start" else f"at {student.weights}"
