"""Build detectors from names, from our checkpoints and from official checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml, shown, validate
from yoloxkd.download import fetch
from yoloxkd.engine.checkpoint import file_digest, is_own
from yoloxkd.engine.checkpoint_parts import read_saved
from yoloxkd.errors import UserError, nearest
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.weights.load import PUBLISHED, LoadReport, load_checkpoint_file, load_into, official_state
from yoloxkd.nn.weights.mmdet_weights import dense_state
from yoloxkd.types import ImageSize


def model_names() -> list[str]:
    """The architectures of `cfg/models/`."""
    return cfg_names("models")


def architecture(name: str) -> tuple[str, dict[str, Any]]:
    """(family, keys of its Config) of a named architecture."""
    if name not in model_names():
        raise UserError(f"unknown model {shown(name)}; {nearest(name, model_names())}")
    keys = read_yaml(cfg_folder() / "models" / f"{name}.yaml")
    return str(keys.pop("family")), keys


def build_detector(section: Mapping[str, Any], names: Sequence[str]) -> Detector[Any, Any]:
    """An untrained detector from a student section ({name, weights, further keys}) for the given class names."""
    family, defaults = architecture(section["name"])
    keys = defaults | {k: v for k, v in section.items() if k not in ("name", "weights", "family")}
    detector = DETECTORS[family]
    config = validate(detector.Config, keys, f"model '{section['name']}'", prefix="student.")
    return detector(config, list(names))


@dataclass
class Weights:
    """The weights in a checkpoint file, whoever wrote it.

    section  the model they belong to ({name, further keys}); name is None when the layout is known but the size is not
    names    class names; named: whether they are in the file, else they are COCO's or made up
    imgsz    input size the model was trained at, where the file says so
    kind     "yoloxkd", "megvii" or "mmdetection"
    """

    section: dict[str, Any]
    names: list[str]
    state: dict[str, Tensor]
    imgsz: ImageSize | None
    kind: str
    path: Path
    digest: str
    named: bool = True


@dataclass
class Opened:
    """A detector with its weights in place."""

    detector: Detector[Any, Any]
    weights: Weights
    report: LoadReport
    reference: str

    @property
    def name(self) -> str:
        return str(self.weights.section["name"])


def image_size(value: Any) -> ImageSize | None:
    """An input size as a file holds it: a number, two of them, or nothing."""
    return tuple(value) if isinstance(value, list | tuple) else value


def find_weights(reference: str) -> Path:
    """The file behind a reference: a path, `NAME@coco`, or a bare NAME, which means its published COCO weights."""
    path = Path(reference)
    if path.is_file():
        return path
    name, _, tag = reference.partition("@")
    if name in model_names() and tag in ("", "coco"):
        if name not in PUBLISHED:
            raise UserError(f"'{name}' has no published weights: give a checkpoint file instead")
        return fetch(PUBLISHED[name])
    if path.is_dir():
        raise UserError(f"'{reference}' is a folder, not a checkpoint file; a run's student is in its best.pt")
    looks_like_file = bool(path.suffix) or len(path.parts) > 1
    if looks_like_file:
        raise UserError(f"no file {reference}; give a checkpoint, or the name of a model ('yoloxkd models' lists them)")
    raise UserError(f"unknown model '{reference}' (neither an architecture nor a file); {nearest(name, model_names())}")


def read_weights(reference: str) -> Weights:
    """Open a checkpoint of ours (a student, or the averaged student of an interrupted run) or an official one."""
    path = find_weights(reference)
    raw = load_checkpoint_file(path)
    digest = file_digest(path)
    if is_own(raw):
        saved = read_saved(raw, path)
        return Weights(saved.student, saved.names, saved.weights, saved.imgsz, "yoloxkd", path, digest)
    with naming(path):
        found = official_state(raw)
        dense = None if found else dense_state(raw, path.name)
    if found is not None:
        names = _plain_names(found.num_classes)
        published = not os.path.isfile(reference)  # those are of COCO for certain
        return Weights({"name": found.architecture}, names, found.state, None, found.source, path, digest, published)
    if dense is None:
        raise UserError(
            f"{path} is not a checkpoint of a known detector (ours, Megvii YOLOX, or mmdetection YOLOX, FCOS, GFL or ATSS)"
        )
    names = dense.names or _plain_names(dense.classes)
    named = dense.names is not None or not os.path.isfile(reference)
    return Weights(dense.section, names, dense.state, None, "mmdetection", path, digest, named)


def _plain_names(classes: int) -> list[str]:
    """Names for a checkpoint that has none: those of COCO where there are 80."""
    return list(COCO_NAMES) if classes == len(COCO_NAMES) else [f"class{i}" for i in range(classes)]


def section_of_checkpoint(path: str) -> dict[str, Any]:
    """The student section of the model in a checkpoint file: name and further keys."""
    section = read_weights(path).section
    if section["name"] is None:
        raise UserError(
            f"{path} holds a YOLOX of a size that has no name here; give --student NAME and student.weights"
        )
    return {k: v for k, v in section.items() if k not in ("family", "weights")}


def open_model(reference: str) -> Opened:
    """A detector for prediction or teaching: built as its weights say, loaded completely."""
    weights = read_weights(reference)
    if weights.section["name"] is None:
        raise UserError(f"{weights.path} holds a YOLOX of a size that has no name here")
    with naming(weights.path):
        detector = build_detector(weights.section, weights.names)
        report = load_into(detector, weights.state, allow_class_mismatch=False)
    return Opened(detector.eval(), weights, report, reference)


def load_student(detector: Detector[Any, Any], reference: str) -> LoadReport:
    """Start a student from a checkpoint; predictors of other classes are left untrained, and the report says so."""
    weights = read_weights(reference)
    same = list(weights.names) == list(detector.names)
    with naming(weights.path):
        return load_into(detector, weights.state, allow_class_mismatch=True, keep_classes=same)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts a file's name before the sentence about it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
