"""Plan of a study: its runs with their recipes, in order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yoloxkd.assembly.models import CheckpointFiles
from yoloxkd.assembly.recipes import resolve
from yoloxkd.config.recipe import Recipe
from yoloxkd.errors import UserError
from yoloxkd.study.definition import GIVEN, SELF, UNTRAINED, Definition, MethodPart

TEACHER = "teacher"
UNTRAINED_FILE = "untrained-teacher.pt"
LOCAL = ("data", "teacher.models")
"""Recipe keys that may differ between a run and what is planned: where its data and its teacher are; what those hold is
compared by digests (`origins`). Of `engine`, which changes nothing of a recipe's mathematics, only the precision counts."""


@dataclass(frozen=True, order=True)
class Key:
    """Which run: student and method by the names in the study, and the seed. `/` joins them to a folder."""

    student: str
    method: str
    seed: int

    @property
    def path(self) -> str:
        return TEACHER if self.student == TEACHER else f"{self.student}/{self.method}-s{self.seed}"


@dataclass
class Run:
    """One run to do.

    out        the study's folder; the run trains in `folder` within it and leaves `best`
    recipe     None for a teacher that comes as a file: it is only measured
    best       the checkpoint that is measured
    needs      runs whose best.pt it learns from
    teacher    who teaches, as the study says it; "" where nobody does
    taught_by  the runs of `needs`: of an untrained teacher the one whose architecture it has
    first      the study's first recipe: a teacher that comes as a file is measured as it says
    settings   the recipe, flat, without what belongs to the machine: what a kept result is compared with
    """

    key: Key
    out: Path
    recipe: Recipe | None
    best: str
    needs: list[Key] = field(default_factory=list)
    teacher: str = ""
    taught_by: list[Run] = field(default_factory=list)
    first: Recipe | None = None

    @property
    def folder(self) -> Path:
        return self.out / self.key.path

    @property
    def epochs(self) -> int:
        return self.recipe.train.epochs if self.recipe else 0

    @property
    def like(self) -> Recipe:
        """What says how it is measured."""
        like = self.recipe or self.first
        assert like is not None
        return like

    @property
    def teacher_files(self) -> list[str]:
        """The checkpoints that teach, as references; for an untrained teacher the one whose architecture it has."""
        return [run.best for run in self.taught_by] or (self.recipe.teacher.models if self.recipe else [])

    @property
    def settings(self) -> dict[str, Any]:
        return portable(self.recipe) | {"teacher": self.teacher} if self.recipe else {}


PRECISION = {"engine.amp": "off"}
"""What a study's runs compute in unless it says otherwise: the same on every machine, so that they can be compared."""


def plan(study: Definition, out: Path, overrides: Mapping[str, Any] | None = None) -> dict[Key, Run]:
    """Every run of the study by its key: the teacher first, then grid by grid, seed by seed, the baseline first.

    overrides  `data`, `device`, `workers` of this machine
    All recipes are resolved here, so a mistake in any of them is found before the first run starts.
    """
    options = dict(overrides or {})
    local = {"data": options.pop("data", study.data), "sets": {f"engine.{k}": v for k, v in options.items()}}
    local["files"] = CheckpointFiles()
    runs: dict[Key, Run] = {}
    teacher = _teacher(study, out, local)
    if teacher is not None:
        runs[teacher.key] = teacher
    for key in keys(study):
        if key not in runs:
            runs[key] = _run(study, key, study.methods[key.method], teacher, out, local)
    first = next(run.recipe for run in runs.values() if run.recipe is not None)
    for run in runs.values():
        run.taught_by, run.first = [runs[key] for key in run.needs], first
    return runs


def keys(study: Definition, grids: Collection[str] | None = None) -> Iterator[Key]:
    """The runs of the students in some grids (None: in all), grid by grid and seed by seed, the baseline first."""
    for title, grid in study.parts().items():
        if grids is not None and title not in grids:
            continue
        methods = sorted(grid.methods or study.methods, key=lambda name: name != (grid.baseline or study.baseline))
        for seed in grid.seeds or study.seeds:
            for student in grid.students or study.students:
                for method in methods:
                    yield Key(student, method, seed)


def _teacher(study: Definition, out: Path, local: dict[str, Any]) -> Run | None:
    part = study.teacher
    if part is None:
        return None
    if part.train is None:
        assert part.file is not None
        return Run(Key(TEACHER, TEACHER, 0), out, None, part.file)
    run = part.train
    key = Key(TEACHER, TEACHER, run.seed)
    recipe = _resolve(
        f"the teacher of study {study.name}",
        student=run.student,
        recipe=run.recipe or study.recipe,
        kd=["none"],
        sets=PRECISION | study.settings | {"val.split": study.choose} | run.settings | local["sets"],
        epochs=run.epochs,
        seed=run.seed,
        data=local["data"],
        files=local["files"],
    )
    return Run(key, out, recipe, _best(out, key))


def _run(study: Definition, key: Key, method: MethodPart, teacher: Run | None, out: Path, local: dict[str, Any]) -> Run:
    part = study.students[key.student]
    models, needs, sets = [], [], {}
    if not method.without_kd:
        if method.teacher == SELF:
            base = Key(key.student, study.baseline, key.seed)
            models, needs = [_best(out, base)], [base]
        elif method.teacher in (GIVEN, UNTRAINED):
            assert teacher is not None
            models, needs = [teacher.best], [teacher.key]
            if method.teacher == UNTRAINED:
                models, sets = [str((out / UNTRAINED_FILE).absolute())], {"teacher.min_ap": 0}
        else:
            models = [method.teacher]
    recipe = _resolve(
        f"run {key.path} of study {study.name}",
        student=part.student,
        recipe=part.recipe or study.recipe,
        teacher=models,
        kd=method.kd or ["none"],
        sets=PRECISION
        | study.settings
        | {"val.split": study.choose}
        | sets
        | part.settings
        | method.settings
        | local["sets"],
        epochs=method.epochs or study.epochs,
        seed=key.seed,
        data=local["data"],
        files=local["files"],
    )
    return Run(key, out, recipe, _best(out, key), needs, "" if method.without_kd else method.teacher)


def _best(out: Path, key: Key) -> str:
    return str((out / key.path / "best.pt").absolute())


def _resolve(where: str, **options: Any) -> Recipe:
    try:
        return resolve(**options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def portable(recipe: Recipe) -> dict[str, Any]:
    """A recipe as flat dotted keys, without the machine; of weights to start from, only whether there are any."""
    flat = dict(_flat(recipe.model_dump(by_alias=True, mode="json")))
    flat = {k: v for k, v in flat.items() if k not in LOCAL and (k == "engine.amp" or not k.startswith("engine."))}
    return flat | {"student.weights": "given" if flat["student.weights"] else None}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def differences(recorded: Mapping[str, Any], planned: Mapping[str, Any]) -> list[str]:
    """What two runs' settings differ in: their distillers, and the keys of both.

    A key that only one has does not count, because it is another version's; nor does a run whose settings are not known.
    """
    if not recorded:
        return []
    methods = [_methods(settings) for settings in (recorded, planned)]
    out = (
        []
        if methods[0] == methods[1]
        else [" instead of ".join(f"kd {'+'.join(names) or 'none'}" for names in methods)]
    )
    return out + [
        f"{k} {recorded[k]!r} instead of {planned[k]!r}" for k in planned if k in recorded and recorded[k] != planned[k]
    ]


def _methods(settings: Mapping[str, Any]) -> list[str]:
    """The distillers whose keys are among a run's settings, by name."""
    return sorted({key.split(".")[1] for key in settings if key.startswith("kd.")})
