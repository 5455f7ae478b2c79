"""Teacher check: refuse a teacher whose weights did not load or whose classes differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from yoloxkd.engine.events import State
from yoloxkd.errors import GateError
from yoloxkd.kd.base import Teacher
from yoloxkd.kd.pairing import Pairing
from yoloxkd.nn.detector import Detector


def known_ap(metrics: Mapping[str, Any], pairing: Pairing) -> float:
    """Mean AP over the student's classes that the teacher knows and that occur; NaN where none does.

    A class that the teacher does not know says nothing about its weights, so it does not count.
    """
    shared_names = [n for n, i in zip(pairing.student.names, pairing.classes.tolist(), strict=True) if i >= 0]
    measured = [float(metrics["per_class"][n]["AP"]) for n in shared_names if n in metrics["per_class"]]
    occur = [ap for ap in measured if not ap < 0]  # -1: no such object in the images; a NaN stays, and fails
    return math.fsum(occur) / len(occur) if occur else math.nan


@contextmanager
def spelled_as_the_student(detector: Detector[Any, Any], pairing: Pairing) -> Iterator[None]:
    """The pairing overlooks case, spaces, hyphens and underscores of class names, an evaluation does not."""
    before = detector.spec
    names = list(before.names)
    for name, index in zip(pairing.student.names, pairing.classes.tolist(), strict=True):
        if index >= 0:
            names[index] = name
    detector.spec = replace(before, names=tuple(names))
    try:
        yield
    finally:
        detector.spec = before


def check_teacher(
    state: State, teacher: Teacher, pairing: Pairing, min_ap: float, gate_images: int | None
) -> float | None:
    """Evaluate a teacher before anything is learnt from it; its AP (0 to 1), or None when it was not measured.

    GateError below `min_ap`; 0 does not evaluate. gate_images: validation images, at most; None: all.
    """
    share = f"{teacher.share:.1%} of its parameters came from the file"
    who = f"teacher {teacher.source}: {share}"
    if min_ap <= 0:
        state.say(f"{who}; not evaluated, since teacher.min_ap is 0")
        return None
    if pairing.known_classes == 0:
        state.say(f"warning: {who}; it knows none of the student's classes, so its AP cannot be measured")
        return None
    images = "all" if gate_images is None else f"at most {gate_images}"
    with spelled_as_the_student(teacher.detector, pairing):
        metrics = state.evaluate(teacher.detector, gate_images)
    ap = known_ap(metrics, pairing)
    if math.isnan(ap) and not math.isnan(float(metrics["AP"])):
        which = "the validation set" if gate_images is None else f"the first {gate_images} validation images"
        raise GateError(
            f"the AP of the teacher {teacher.source} cannot be measured: {which} show no object of a class it knows; add "
            "such images, raise teacher.gate_images, or use --set teacher.min_ap=0 to train without measuring it"
        )
    n = len(pairing.student.names)
    over = "" if pairing.known_classes == n else f" over the {pairing.known_classes} of {n} classes that it knows"
    state.say(f"{who}; AP {ap:.3f} on {images} validation images{over}")
    if not ap >= min_ap:  # a NaN fails too
        raise GateError(
            f"the teacher {teacher.source} reaches AP {ap:.3f} on the validation set{over}, below teacher.min_ap "
            f"{min_ap:g} ({share}); check its weights and class names, or use --set teacher.min_ap=0 to "
            "train with it all the same"
        )
    return ap
