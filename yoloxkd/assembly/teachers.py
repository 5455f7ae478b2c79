"""Open the teachers of a run, and find their class names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from yoloxkd.assembly.models import CheckpointFiles, Opened, open_model
from yoloxkd.config.recipe import TeacherSection
from yoloxkd.errors import UserError
from yoloxkd.kd.pairing import match_classes
from yoloxkd.nn.coco_names import COCO_NAMES

SHOWN = 6


def open_teachers(
    section: TeacherSection,
    classes: Sequence[str],
    say: Callable[[str], None],
    files: CheckpointFiles | None = None,
) -> list[Opened]:
    """The teachers of a recipe, with the names of their classes: the file's, else those of `teacher.names`, else assumed.

    classes  of the data set, in its order
    say      takes a line about names that are not the file's
    UserError: a file without names needs them, or those given cannot be right.
    """
    opened = [open_model(reference, files) for reference in section.models]
    for index, teacher in enumerate(opened):
        names = section.names[index] if section.names else None
        if names is not None:
            _name(teacher, names, classes, say)
        elif not teacher.weights.named:
            _assume(teacher, classes, section, say)
    return opened


def names_key(section: TeacherSection, index: int, names: str) -> str:
    """How the names of one teacher are set, as a user types it."""
    lists = ["null"] * len(section.models)
    lists[index] = f"[{names}]"
    return f"--set 'teacher.names={lists[0] if len(lists) == 1 else '[' + ','.join(lists) + ']'}'"


def _name(teacher: Opened, names: list[str], classes: Sequence[str], say: Callable[[str], None]) -> None:
    weights = teacher.weights
    if len(names) != len(weights.names):
        raise UserError(
            f"teacher {weights.path} predicts {len(weights.names)} classes, and teacher.names gives {len(names)}; give one "
            "name for each, in the order of the file's classes"
        )
    in_data_set = (match_classes(names, classes) >= 0).tolist()
    if not any(in_data_set):
        raise UserError(
            f"none of the names that teacher.names gives to {weights.path} ({_first_names(names)}) is a class of the "
            f"data set ({_first_names(classes)}); use the data set's names for the classes that are the same"
        )
    if weights.named and names != weights.names:
        say(
            f"warning: teacher {weights.path}: the class names in the file ({_first_names(weights.names)}) give way to "
            f"those of teacher.names ({_first_names(names)})"
        )
    others = [name for name, is_class in zip(names, in_data_set, strict=True) if not is_class]
    tail = f"; {len(others)} of them no class of the data set: {_first_names(others)}" if others else ""
    say(f"teacher {weights.path}: {len(names)} class names from teacher.names{tail}")
    _set(teacher, names)


def _assume(teacher: Opened, classes: Sequence[str], section: TeacherSection, say: Callable[[str], None]) -> None:
    """Names for a file without: COCO's where they can be meant, else the data set's where there are as many."""
    weights = teacher.weights
    count, index = len(weights.names), section.models.index(teacher.reference)
    how = names_key(section, index, "NAME,NAME,...")
    coco = bool((match_classes(classes, COCO_NAMES) >= 0).any())
    if count == len(COCO_NAMES) and (coco or count != len(classes)):
        say(f"teacher {weights.path} has no class names; its {count} classes are taken to be COCO's")
        return
    if count == len(classes):
        say(
            f"warning: teacher {weights.path} has no class names; it has as many classes as the data set, {count}, and they "
            f"are taken to be the data set's in its order ({_first_names(classes)}). If they are others, say so with "
            f"{how}"
        )
        _set(teacher, classes)
        return
    if section.min_ap == 0:
        say(
            f"warning: teacher {weights.path} has no class names, and {count} classes where the data set has "
            f"{len(classes)}, so that it teaches no class by name; {how} would name them"
        )
        return
    raise UserError(
        f"teacher {weights.path} has {count} classes without names in the file, and the data set has {len(classes)}; name "
        f"the teacher's, in its order, with {how}, or set teacher.min_ap=0 for a teacher that knows no class by name"
    )


def _set(teacher: Opened, names: Sequence[str]) -> None:
    teacher.weights.names = list(names)
    teacher.detector.spec = replace(teacher.detector.spec, names=tuple(names))


def names_from_files(value: Any) -> Any:
    """What `teacher.names` says; the name of a text file gives way to the class names in it, one a line.

    UserError: the file cannot be read.
    """
    if not isinstance(value, str) or not os.path.isfile(value):
        return value
    try:
        lines = Path(value).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"teacher.names: cannot read {value}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
