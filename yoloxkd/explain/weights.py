"""Cells that distillers teach: foreground weights side by side (PGD Figure 1, Table 5), and any distiller's maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yoloxkd.explain.scene import Model, Scene
from yoloxkd.kd import DISTILLERS
from yoloxkd.kd.base import Distiller, Pair, Step
from yoloxkd.kd.defaults import kd_defaults, split_name
from yoloxkd.kd.functional.importance import STRATEGIES
from yoloxkd.kd.methods.pgd import PGD, PGDConfig
from yoloxkd.kd.pairing import Pairing
from yoloxkd.types import Batch, DenseOutput, Targets

_NECK_METHODS = {"fgfi": "near an object", "defeat": "foreground", "tadf": "Gaussians"}
FOREGROUNDS: tuple[str, ...] = (*STRATEGIES, *_NECK_METHODS)
"""The seven strategies of PGD's Table 5, and the methods of its Figure 1."""


@dataclass(frozen=True, slots=True)
class ForegroundWeights:
    """How one rule weighs the cells of an image.

    Attributes:
        name: one of `FOREGROUNDS`
        levels: {stride: (h, w) float32, 0 to 1}, the largest over the objects
        cells_per_object: {stride: cells with a weight, mean over objects, each object for itself}
        inside_share: cells with a weight over all cells inside the object's box, mean over objects that have a cell;
            a weight outside the box does not count
    """

    name: str
    levels: dict[int, np.ndarray]
    cells_per_object: dict[int, float]
    inside_share: float


@torch.no_grad()
def foreground_weights(
    teacher: Model, out: DenseOutput, scene: Scene, names: Sequence[str] = FOREGROUNDS
) -> list[ForegroundWeights]:
    """The foreground of each rule on all levels of a teacher, at the published settings of its family.

    Args:
        out: what `see(teacher, scene)` gave

    Raises:
        UserError: the teacher predicts at no fixed cells, or knows no class of the data set.
    """
    teacher.check_tower("weights")
    classes = teacher.classes(scene.names)
    self_pairing = Pairing.between(teacher.detector, teacher.detector)
    pairing = replace(self_pairing, classes=classes, taught=torch.ones(len(classes), dtype=torch.bool))
    together = _step(teacher, out, scene.batch)
    count = int(scene.batch.targets.mask.sum())
    apart = _step(teacher, _repeated(out, count), _one_object_each(scene.batch, count))
    inside = _levels("box", pairing, teacher, apart)
    return [_weights(name, pairing, teacher, together, apart, inside) for name in names]


def _weights(
    name: str, pairing: Pairing, teacher: Model, together: Step[Any], apart: Step[Any], inside: list[Tensor]
) -> ForegroundWeights:
    strides = [level.stride for level in pairing.levels]
    foreground = [level > 0 for level in _levels(name, pairing, teacher, apart)]
    cells = torch.stack([level.flatten(1).sum(1) for level in inside]).sum(0)
    foreground_inside = torch.stack(
        [(c & (box > 0)).flatten(1).sum(1) for c, box in zip(foreground, inside, strict=True)]
    ).sum(0)
    there = cells > 0
    return ForegroundWeights(
        name,
        {
            s: level[0].float().cpu().numpy()
            for s, level in zip(strides, _levels(name, pairing, teacher, together), strict=True)
        },
        {s: float(c.flatten(1).sum(1).double().mean()) for s, c in zip(strides, foreground, strict=True)},
        float((foreground_inside[there] / cells[there]).mean()) if bool(there.any()) else 0.0,
    )


def _levels(name: str, pairing: Pairing, teacher: Model, step: Step[Any]) -> list[Tensor]:
    """The weights of one rule: (B, h, w) a level."""
    family = teacher.detector.family
    if name in STRATEGIES:
        cfg = PGDConfig.model_validate(kd_defaults("pgd", family) | {"foreground": name, "branches": ["cls"]})
        levels = list(cfg.level_weights) + [1.0] * len(pairing.levels)
        return PGD(cfg.model_copy(update={"level_weights": levels}), pairing).regions(step)[0]["cls"]
    keys = kd_defaults(name, family) | {"adapter": "1x1"}  # a 3x3 convolution would take time and change no weight
    maps = _distiller(name, keys, pairing).to(step.batch.content.device).maps(step)
    return [maps[f"{_NECK_METHODS[name]}, stride {level.stride}"] for level in pairing.levels]


@torch.no_grad()
def distiller_maps(
    name: str, student: Model, teacher: Model, outs: tuple[Any, Any], scene: Scene
) -> dict[str, np.ndarray]:
    """What a distiller looks at: {what it is, with its stride: (h, w) float32}; nothing where it prefers no cells.

    Args:
        name: METHOD or METHOD@SET, as `--kd` takes it
        outs: what `see` gave for the student and for the teacher

    Raises:
        UserError: unknown method, detectors that it does not fit, or that know no class of the data set.
    """
    for model in (student, teacher):
        model.classes(scene.names)
    pairing = Pairing.between(student.detector, teacher.detector)
    targets = scene.targets_of(student.classes(scene.names))
    batch = replace(scene.batch, targets=targets)
    match = student.detector.assign(outs[0], targets)
    step: Step[Any] = Step(outs[0], outs[1], batch, match, Pair(student.detector, teacher.detector))
    maps = (
        _distiller(name, kd_defaults(name, student.detector.family), pairing).eval().to(batch.content.device).maps(step)
    )
    return {what: values[0].float().cpu().numpy() for what, values in maps.items()}


def _distiller(name: str, keys: Mapping[str, Any], pairing: Pairing) -> Distiller:
    kind = DISTILLERS.find(split_name(name)[0])
    return kind(kind.Config.model_validate(keys), pairing)


def _step(teacher: Model, out: Any, batch: Batch) -> Step[Any]:
    """The teacher beside itself, so that no map needs an adapter."""
    return Step(out, out, batch, None, Pair(teacher.detector, teacher.detector))


def _one_object_each(batch: Batch, count: int) -> Batch:
    """The image once for each of its objects, which is the only one there."""
    targets = batch.targets
    rows = targets.mask[0].nonzero()[:, 0]
    return replace(
        batch.map(lambda x: x.expand(count, *x.shape[1:])),
        targets=Targets(
            targets.boxes[0, rows][:, None],
            targets.labels[0, rows][:, None],
            torch.ones(count, 1, dtype=torch.bool, device=rows.device),
            torch.zeros(count, 1, dtype=torch.bool, device=rows.device),
        ),
    )


def _repeated(out: DenseOutput, count: int) -> DenseOutput:
    """The output of one image as that of `count` equal images, without copies."""

    def many(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(many, value))
        return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value

    return replace(out, **{f.name: many(getattr(out, f.name)) for f in fields(out)})
