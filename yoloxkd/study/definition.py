"""Definition of a study (YAML): students x methods x seeds, a teacher, shared settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import leaves, read_yaml, validate
from yoloxkd.config.strict import Strict
from yoloxkd.errors import UserError, nearest
from yoloxkd.kd.defaults import split_name

Seed = Annotated[int, Field(ge=0)]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
GIVEN, SELF, UNTRAINED = "given", "self", "untrained"
"""Who teaches: the study's teacher; the plain student of the same seed; the teacher's architecture with random weights."""


class TeacherRun(Strict):
    """A teacher that the study trains itself, before the students that need it."""

    student: str = Field(description="architecture, NAME@coco or checkpoint file to start from")
    recipe: str | None = Field(None, description="recipe name or file; None: the architecture's own")
    epochs: int | None = Field(None, ge=1, description="None: the recipe's")
    seed: Seed = 0
    settings: dict[str, Any] = Field(default_factory=dict, description="dotted recipe keys, on top of the study's")


class TeacherPart(Strict):
    """Who teaches the students: a checkpoint, or a run to train first."""

    file: str | None = Field(None, description="checkpoint file or NAME@coco")
    train: TeacherRun | None = Field(None, description="the run that makes it")


class StudentPart(Strict):
    """One student of the study."""

    student: str = Field(description="architecture, NAME@coco or checkpoint file to start from")
    recipe: str | None = Field(None, description="recipe name or file; None: the architecture's own")
    settings: dict[str, Any] = Field(default_factory=dict, description="dotted recipe keys for this student's runs")


class MethodPart(Strict):
    """One way to train a student. Without `kd` it trains alone."""

    kd: list[str] = Field(default_factory=list, description="distillers; none: the student trains alone")
    teacher: str = Field(
        GIVEN, description="given, self (the plain student of the same seed), untrained, or a checkpoint"
    )
    epochs: int | None = Field(None, ge=1, description="None: the study's")
    settings: dict[str, Any] = Field(default_factory=dict, description="dotted recipe keys, e.g. kd.alpha")
    note: str = Field("", description="a few words for the tables")

    @field_validator("kd", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        methods = [value] if isinstance(value, str) else value
        return [] if methods in (None, ["none"]) else methods

    @property
    def without_kd(self) -> bool:
        return not self.kd


class Grid(Strict):
    """A part of the study with a table of its own; what is left out is all of it."""

    title: str = ""
    students: list[str] | None = None
    methods: list[str] | None = None
    seeds: list[Seed] | None = Field(None, min_length=1)
    baseline: str | None = Field(None, description="the method of this grid that its gains are to; None: the study's")


class Definition(Strict):
    """A study. All runs share data, epochs and settings; a run is one student, one method, one seed.

    The best epoch of a run is chosen on `choose`; what is reported is measured on `report` once, afterwards.
    """

    name: str = ""
    data: str = Field(description="data YAML, a name, or shapes")
    epochs: int = Field(ge=1)
    seeds: list[Seed] = Field(min_length=1)
    recipe: str | None = Field(None, description="recipe for every student that names none")
    settings: dict[str, Any] = Field(default_factory=dict, description="dotted recipe keys for every run")
    choose: str = Field("val", description="split that chooses the best epoch")
    report: str = Field("test", description="split that is reported")
    screening: bool = Field(
        False, description="choose and report on one split: to choose a setting, with the reported split left alone"
    )
    baseline: str = Field("none", description="the plain method that others are compared with, seed by seed")
    teacher: TeacherPart | None = None
    students: dict[str, StudentPart] = Field(min_length=1)
    methods: dict[str, MethodPart] = Field(min_length=1)
    grids: dict[str, Grid] = Field(default_factory=dict, description="none: one grid of everything")

    @field_validator("students", "methods", mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """`none:` without a value is a method with nothing set; `x: yolox-s` is a student with nothing set."""
        if not isinstance(value, dict):
            return value
        return {k: {} if v is None else {"student": v} if isinstance(v, str) else v for k, v in value.items()}

    def parts(self) -> dict[str, Grid]:
        return self.grids or {"all": Grid()}


def find_study(name: str) -> Path:
    """A study by file name or by the name of one in `cfg/studies/`."""
    if Path(name).is_file():
        return Path(name)
    shipped = cfg_folder() / "studies" / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    raise UserError(f"no study '{name}': neither a file nor a shipped study; {nearest(name, cfg_names('studies'))}")


def read_study(name: str) -> Definition:
    """The checked definition of a study. UserError: unknown keys, names that nothing bears, no plain baseline, ..."""
    path = find_study(name)
    where = f"study {path.name}"
    known_keys = [*leaves(Definition), *_inner()]
    study = validate(Definition, read_yaml(path), where, known_keys)
    study.name = study.name or path.stem
    _check_names(study, where)
    _check_repeats(study, where)
    _check_methods(study, where)
    _check_baseline(study, where)
    return study


def _inner() -> list[str]:
    """Keys below names that the user chooses, to suggest from."""
    parts: dict[str, type[Strict]] = {"teacher": TeacherPart, "teacher.train": TeacherRun}
    parts |= {"students.NAME": StudentPart, "methods.NAME": MethodPart, "grids.NAME": Grid}
    return [f"{prefix}.{key}" for prefix, part in parts.items() for key in part.model_fields]


def _check_names(study: Definition, where: str) -> None:
    for kind, names in (("study", [study.name]), ("student", study.students), ("method", study.methods)):
        for name in names:
            if not NAME.fullmatch(str(name)):
                raise UserError(
                    f"the {where} calls a {kind} '{name}'; names become folders, so letters, digits, . _ + - are allowed"
                )
    if study.name.casefold() == "summary":
        raise UserError(f"the {where} is called '{study.name}', and summary.csv is the table of all studies; rename it")
    for kind, names in (("student", study.students), ("method", study.methods)):
        spellings: dict[str, str] = {}
        for name in names:
            if spellings.setdefault(name.casefold(), name) != name:
                raise UserError(
                    f"the {where} has the {kind}s '{spellings[name.casefold()]}' and '{name}', whose folders are one where case "
                    "does not count; rename one"
                )
    if "teacher" in study.students:
        raise UserError(f"the {where} calls a student 'teacher', which is the teacher's own row; rename it")
    for title, grid in study.grids.items():
        for kind, listed, defined in (
            ("student", grid.students, study.students),
            ("method", grid.methods, study.methods),
        ):
            for name in listed or ():
                if name not in defined:
                    raise UserError(
                        f"grid '{title}' of the {where} names the {kind} '{name}'; {nearest(name, defined)}"
                    )


def _check_repeats(study: Definition, where: str) -> None:
    lists: list[tuple[str, list[Any]]] = [(f"'seeds' of the {where}", study.seeds)]
    for title, grid in study.grids.items():
        for kind in ("students", "methods", "seeds"):
            lists.append((f"'{kind}' of grid '{title}' in the {where}", getattr(grid, kind) or []))
    for place, values in lists:
        repeated = next((value for value in values if values.count(value) > 1), None)
        if repeated is not None:
            raise UserError(f"{place} names {repeated} twice, and its runs would be counted twice; name it once")


def _check_methods(study: Definition, where: str) -> None:
    part = study.teacher
    if part is not None and (part.file is None) == (part.train is None):
        raise UserError(f"the teacher in the {where} needs either 'file' or 'train', and not both")
    for name, method in study.methods.items():
        for kd in method.kd:
            try:
                split_name(kd)
            except UserError as wrong:
                raise UserError(f"method '{name}' in the {where}: {wrong}") from wrong
        if method.without_kd and method.teacher != GIVEN:
            raise UserError(
                f"method '{name}' in the {where} has a teacher and no kd; give it a distiller, or drop both"
            )
        if part is None and not method.without_kd and method.teacher in (GIVEN, UNTRAINED):
            raise UserError(f"method '{name}' in the {where} needs a teacher, and the study gives none")
    if study.choose == study.report and not study.screening:
        raise UserError(
            f"the {where} chooses and reports on the same split '{study.report}'; what is reported would be too good (a study "
            "that only chooses a setting says so: screening: true)"
        )
    if study.screening and study.choose != study.report:
        raise UserError(
            f"the {where} has screening, which chooses and reports on one split, and reports on '{study.report}'; set report "
            f"to {study.choose}, or leave screening out"
        )


def _check_baseline(study: Definition, where: str) -> None:
    for title, grid in study.grids.items():
        if grid.baseline is not None and grid.baseline not in (grid.methods or study.methods):
            raise UserError(
                f"grid '{title}' of the {where} has the baseline '{grid.baseline}', which is none of its methods"
            )
    base = study.methods.get(study.baseline)
    if base is None or not base.without_kd:
        candidates = [name for name, method in study.methods.items() if method.without_kd]
        raise UserError(
            f"the {where} has no plain baseline for the paired differences: 'baseline' is '{study.baseline}', and "
            + (
                f"it should be one of {', '.join(candidates)}"
                if candidates
                else "no method of the study trains without kd"
            )
        )
    planned = {
        (student, seed)
        for grid in study.parts().values()
        if study.baseline in (grid.methods or study.methods)
        for student in grid.students or study.students
        for seed in grid.seeds or study.seeds
    }
    for title, grid in study.parts().items():
        taught_by_plain = any(study.methods[name].teacher == SELF for name in grid.methods or study.methods)
        if grid.baseline is not None and not taught_by_plain:
            continue
        for student in grid.students or study.students:
            for seed in grid.seeds or study.seeds:
                if (student, seed) not in planned:
                    raise UserError(
                        f"grid '{title}' of the {where} has no baseline '{study.baseline}' for student '{student}' and "
                        f"seed {seed}; add it to the grid's methods"
                    )
