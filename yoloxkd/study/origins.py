"""What a run was made from: data, starting weights and teachers, by digests, because their paths differ between machines."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from yoloxkd.assembly.models import model_names, naming, read_weights
from yoloxkd.assembly.older_checkpoints import current_layout
from yoloxkd.assembly.recipes import check
from yoloxkd.cache_folders import find_cached
from yoloxkd.config.load import read_yaml
from yoloxkd.config.recipe import Recipe
from yoloxkd.data.data_spec import DataSpec, find_data, load_split
from yoloxkd.data.fingerprint import fingerprint
from yoloxkd.data.shapes import LEVELS, VERSION
from yoloxkd.engine.checkpoint import file_digest, is_checkpoint
from yoloxkd.engine.checkpoint_parts import read_saved
from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import PUBLISHED, load_checkpoint_file
from yoloxkd.study.definition import UNTRAINED
from yoloxkd.study.files import EnvironmentFile, RunFile, read_file
from yoloxkd.study.plan import UNTRAINED_FILE, Run, differences, portable

ANOTHER_TEACHER = "another teacher"
OTHER_START = "other starting weights"


def weights_digest(checkpoint: str) -> str:
    """SHA-256 of a checkpoint's weights alone, names and values: equal where two runs made the same model."""
    digest = hashlib.sha256()
    for name, value in sorted(read_weights(checkpoint).state.items()):
        digest.update(name.encode() + str(value.dtype).encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def local_file(reference: str) -> Path | None:
    """The file behind a checkpoint's name where it is on this machine already; nothing is downloaded."""
    if Path(reference).is_file():
        return Path(reference)
    name = reference if reference in model_names() else reference.removesuffix("@coco")
    cached = find_cached(PUBLISHED[name].filename) if name in PUBLISHED else None
    return cached if cached is not None and cached.is_file() else None


def local_data(name: str) -> DataSpec | None:
    """A data set where it is on this machine already; None: it is not, or its description cannot be used."""
    if name in LEVELS and not find_cached(f"{name}-{VERSION}").is_dir():
        return None
    try:
        return find_data(name)
    except UserError:
        return None


def measurable(run: Run) -> bool:
    """Whether a run's training is over and its best student, or the file of a teacher that is one, is here."""
    if run.recipe is None:
        return local_file(run.best) is not None
    return (run.folder / "metrics.json").is_file() and Path(run.best).is_file()


class AtHand:
    """Digests of what is on this machine, each computed once. None: it is not here, or cannot be read."""

    def __init__(self) -> None:
        self._weights: dict[str, str | None] = {}
        self._files: dict[str, str | None] = {}
        self._data: dict[tuple[str, str, bool], str | None] = {}

    def weights(self, reference: str) -> str | None:
        """As `weights_digest`."""
        if reference not in self._weights:
            try:
                self._weights[reference] = weights_digest(reference) if local_file(reference) else None
            except UserError:
                self._weights[reference] = None
        return self._weights[reference]

    def file(self, reference: str) -> str | None:
        """SHA-256 of a checkpoint's file."""
        if reference not in self._files:
            path = local_file(reference)
            self._files[reference] = file_digest(path) if path else None
        return self._files[reference]

    def data(self, name: str, split: str, *, masks: bool = False) -> str | None:
        """Of `data.fingerprint`, of a split; its annotations are read, its images are not decoded."""
        key = (name, split, masks)
        if key not in self._data:
            spec = local_data(name)
            try:
                loaded = None if spec is None else load_split(spec, split, masks=masks)
                self._data[key] = None if loaded is None else fingerprint(loaded)["digest"]
            except UserError:
                self._data[key] = None
        return self._data[key]

    def same_data(self, name: str, split: str, digest: str) -> bool:
        """Whether a split has this digest, with or without its masks; true where that cannot be told."""
        now = self.data(name, split)
        return now in (None, digest) or self.data(name, split, masks=True) == digest

    def same_teacher(self, reference: str, file: str | None, weights: str | None) -> bool:
        """Whether a checkpoint is the file of one digest, or holds the weights of the other; true where nobody can tell."""
        now = self.file(reference)
        if now is None or (file, weights) == (None, None) or now == file:
            return True
        return weights is not None and self.weights(reference) in (None, weights)


def origin(run: Run) -> dict[str, Any]:
    """What run.json says of where a finished run comes from: the digests of `RunFile`. What is not here any more is left out."""
    if run.recipe is None:
        return {"data_digests": {}}
    taught = _environment(run).kd.teachers
    weights: list[str | None] = []
    for index, reference in enumerate(run.teacher_files):
        digest = taught[index].digest if index < len(taught) else None
        path = local_file(reference)
        known = path is not None and (run.teacher == UNTRAINED or file_digest(path) == digest)
        weights.append(weights_digest(reference) if known else None)
    source = run.taught_by[0] if run.taught_by else None
    return {
        "data_digests": _saved_data(Path(run.best)),
        "start_digest": _start(run),
        "teacher_digests": [teacher.digest for teacher in taught],
        "teacher_weights": weights,
        "teacher_settings": source.settings if source else {},
        "teacher_start": _start(source) if source else None,
    }


def kept_differences(run: Run, recorded: RunFile, here: AtHand) -> list[str]:
    """What a kept run was made from, where that is not what the study now names; what either side does not know is left out."""
    out = [
        f"other images or annotations in '{split}'"
        for split, digest in recorded.data_digests.items()
        if not here.same_data(run.like.data, split, digest)
    ]
    if run.recipe is None:
        other = recorded.weights is not None and here.weights(run.best) not in (None, recorded.weights)
        return out + [ANOTHER_TEACHER] * other
    if _other_start(run, recorded.start_digest, here):
        out.append(OTHER_START)
    return out + _other_teachers(run, recorded, here)


def begun_differences(run: Run, here: AtHand) -> list[str]:
    """The same of a run that was begun in its folder."""
    assert run.recipe is not None
    begun = _begun_recipe(run)
    if begun is None:
        return []
    saved = next((run.folder / name for name in ("last.pt", "best.pt") if (run.folder / name).is_file()), None)
    out = [
        f"other images or annotations in '{split}'"
        for split, digest in (_saved_data(saved) if saved else {}).items()
        if not here.same_data(run.recipe.data, split, digest)
    ]
    started = begun.student.weights
    if started and started != run.recipe.student.weights and _other_start(run, here.weights(started), here):
        out.append(OTHER_START)
    models, digests = run.recipe.teacher.models, [teacher.digest for teacher in _environment(run).kd.teachers]
    own = bool(run.taught_by) and not (run.taught_by[0].recipe is None and run.teacher != UNTRAINED)
    moved = own and not all(_same_place(run, model) for model in begun.teacher.models)
    replaced = len(digests) == len(models) and not all(
        here.same_teacher(model, digest, None) for model, digest in zip(models, digests, strict=True)
    )
    return out + [ANOTHER_TEACHER] * (moved or replaced)


def _other_teachers(run: Run, recorded: RunFile, here: AtHand) -> list[str]:
    planned = run.taught_by[0] if run.taught_by else None
    if (
        planned is not None and planned.recipe is not None
    ):  # trained here: again on another machine it may differ in last bits
        if recorded.teacher_weights is None:
            return []
        if not recorded.teacher_settings:
            return [ANOTHER_TEACHER]
        out = [f"the teacher's {text}" for text in differences(recorded.teacher_settings, planned.settings)]
        return out + [f"the teacher's {OTHER_START}"] * _other_start(planned, recorded.teacher_start, here)
    files: list[str | None] = [] if run.teacher == UNTRAINED else list(recorded.teacher_digests)
    weights = recorded.teacher_weights or []
    for index, reference in enumerate(run.teacher_files):
        file, weight = (values[index] if index < len(values) else None for values in (files, weights))
        if not here.same_teacher(reference, file, weight):
            return [ANOTHER_TEACHER]
    return []


def _other_start(run: Run, digest: str | None, here: AtHand) -> bool:
    planned = run.recipe.student.weights if run.recipe else None
    return bool(planned and digest) and here.weights(str(planned)) not in (None, digest)


def _start(run: Run) -> str | None:
    """The digest of the weights that a run started from, by its recipe.yaml; None: from scratch, or they are not here."""
    begun = _begun_recipe(run) or run.recipe
    reference = begun.student.weights if begun else None
    return weights_digest(reference) if reference and local_file(reference) else None


def _begun_recipe(run: Run) -> Recipe | None:
    file = run.folder / "recipe.yaml"
    if not file.is_file():
        return None
    with naming(file):
        return check(read_yaml(file))


def read_settings(run: Run) -> dict[str, Any]:
    """The settings of a run that was begun, from its recipe.yaml; empty where there is none."""
    begun = _begun_recipe(run)
    return portable(begun) if begun else {}


def _environment(run: Run) -> EnvironmentFile:
    file = run.folder / "environment.json"
    return read_file(EnvironmentFile, file) if file.is_file() else EnvironmentFile()


def _saved_data(checkpoint: Path) -> dict[str, str]:
    """Split -> digest of the data that a checkpoint's run was begun with; empty where it does not say so or is damaged."""
    try:
        raw = load_checkpoint_file(checkpoint)
        saved = read_saved(current_layout(raw), checkpoint).data if is_checkpoint(raw) else {}
    except UserError:
        return {}
    return {split: part.digest for split, part in saved.items()}


def _same_place(run: Run, begun: str) -> bool:
    """Whether a teacher's file lies where the study now has that of the run's teacher; the study's folder may have moved."""
    place = Path(UNTRAINED_FILE if run.teacher == UNTRAINED else f"{run.taught_by[0].key.path}/best.pt").parts
    return Path(begun).parts[-len(place) :] == place
