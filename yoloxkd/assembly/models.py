"""Build detectors from names, from our checkpoints and from official checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from yoloxkd.assembly.older_checkpoints import current_layout
from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml, shown, validate
from yoloxkd.config.quantization import QuantizeSection
from yoloxkd.config.recipe import Student
from yoloxkd.download import fetch
from yoloxkd.engine.checkpoint import file_digest, is_checkpoint
from yoloxkd.engine.checkpoint_parts import read_saved
from yoloxkd.errors import UserError, nearest, nearest_file
from yoloxkd.nn import DETECTORS
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import fake_quantize
from yoloxkd.nn.solo.key_map import mmdetection_solo
from yoloxkd.nn.two_stage.key_map import mmdetection_two_stage, torchvision_two_stage
from yoloxkd.nn.weights.load import PUBLISHED, LoadReport, load_checkpoint_file, load_into, official_state
from yoloxkd.nn.weights.mmdet_weights import DenseState, class_names, dense_state
from yoloxkd.nn.weights.torchvision_weights import torchvision_state
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


def parse_student(section: Mapping[str, Any]) -> Student:
    """The typed section of a model from its keys ({name, further keys}), over those of its architecture."""
    family, defaults = architecture(section["name"])
    keys = defaults | {k: v for k, v in section.items() if k not in ("name", "weights", "family")}
    config = validate(DETECTORS[family].Config, keys, f"model '{section['name']}'", prefix="student.")
    return Student(name=section["name"], weights=section.get("weights"), config=config)


def new_detector(student: Student, names: Sequence[str]) -> Detector[Any, Any]:
    """An untrained detector for the given class names."""
    family, _ = architecture(student.name)
    return DETECTORS[family](student.config, list(names))


def build_detector(section: Mapping[str, Any], names: Sequence[str]) -> Detector[Any, Any]:
    """As `new_detector`, from the keys of a section."""
    return new_detector(parse_student(section), names)


@dataclass
class Weights:
    """The weights in a checkpoint file, whoever wrote it.

    Attributes:
        section: the model they belong to ({name, further keys}); name is None when the layout is known but
            the size is not
        names: class names; named: whether they are in the file, else they are COCO's or made up
        imgsz: input size the model was trained at, where the file says so
        kind: "yoloxkd", "megvii", "mmdetection" or "torchvision"
        quantize: how its convolutions are rounded, where it was trained for int8
    """

    section: dict[str, Any]
    names: list[str]
    state: dict[str, Tensor]
    imgsz: ImageSize | None
    kind: str
    path: Path
    digest: str
    named: bool = True
    quantize: QuantizeSection | None = None


@dataclass
class Opened:
    """A detector with its weights in place."""

    detector: Detector[Any, Any]
    student: Student
    weights: Weights
    report: LoadReport
    reference: str

    @property
    def name(self) -> str:
        return self.student.name


def image_size(value: Any) -> ImageSize | None:
    """An input size as a file holds it: a number, two of them, or nothing."""
    return tuple(value) if isinstance(value, list | tuple) else value


def find_weights(reference: str) -> Path:
    """The file behind a reference: a path, `NAME@coco`, or a bare NAME, which means its published COCO weights.

    A model may itself be called NAME@SOURCE, `fcos-r50@torchvision`, whose weights are those of that source.
    """
    path = Path(reference)
    if path.is_file():
        return path
    name, _, tag = (reference, "", "") if reference in model_names() else reference.partition("@")
    if name in model_names() and tag in ("", "coco"):
        if name not in PUBLISHED:
            raise UserError(f"'{name}' has no published weights: give a checkpoint file instead")
        return fetch(PUBLISHED[name])
    if path.is_dir():
        raise UserError(f"'{reference}' is a folder, not a checkpoint file; a run's student is in its best.pt")
    looks_like_file = bool(path.suffix) or len(path.parts) > 1
    if looks_like_file:
        tail = nearest_file(path) or "; give a checkpoint, or the name of a model ('yoloxkd models' lists them)"
        raise UserError(f"no file {reference}{tail}")
    raise UserError(f"unknown model '{reference}' (neither an architecture nor a file); {nearest(name, model_names())}")


class CheckpointFiles:
    """The checkpoints of one command, each opened once, however many ask for it."""

    def __init__(self) -> None:
        self._weights: dict[Path, Weights] = {}

    def read(self, reference: str) -> Weights:
        """The weights behind a reference (see `find_weights`). UserError: there is no such file, or it holds none."""
        path = find_weights(reference)
        weights = self._weights.get(path.resolve()) or _open(path)
        self._weights[path.resolve()] = weights
        published = not os.path.isfile(reference)  # those are of COCO for certain
        return replace(weights, names=list(weights.names), named=weights.named or published)

    def section(self, reference: str) -> dict[str, Any]:
        """The student section of the model in a checkpoint: name and further keys."""
        section = self.read(reference).section
        if section["name"] is None:
            raise UserError(
                f"{reference} holds a YOLOX of a size that has no name here; give --student NAME and student.weights"
            )
        return {k: v for k, v in section.items() if k not in ("family", "weights")}

    def clear(self) -> None:
        """Give the memory of the weights back."""
        self._weights.clear()


def _open(path: Path) -> Weights:
    """The weights in a checkpoint of ours (a student, or the averaged student of an interrupted run) or an official one."""
    raw = load_checkpoint_file(path)
    digest = file_digest(path)
    if is_checkpoint(raw):
        saved = read_saved(current_layout(raw), path)
        with naming(path):
            quantize = (
                validate(QuantizeSection, saved.quantize, "checkpoint", prefix="quantize.") if saved.quantize else None
            )
        return Weights(
            saved.student, saved.names, saved.weights, saved.imgsz, "yoloxkd", path, digest, quantize=quantize
        )
    with naming(path):
        yolox = official_state(raw)
        dense = None if yolox else _mmdetection(raw, path.name)
        foreign = None if yolox or dense else torchvision_state(raw, digest) or torchvision_two_stage(raw, digest)
    if yolox is not None:
        with naming(path):
            own = class_names(raw.get("meta"), yolox.num_classes) if yolox.source == "mmdetection" else None
        names, named = own or _assumed_names(yolox.num_classes), own is not None
        return Weights({"name": yolox.architecture}, names, yolox.state, None, yolox.source, path, digest, named)
    kind = "mmdetection" if dense else "torchvision"
    dense = dense or foreign
    if dense is None:
        raise UserError(
            f"{path} is not a checkpoint of a known detector (ours, Megvii YOLOX, mmdetection YOLOX, FCOS, GFL, ATSS, "
            "RetinaNet, AutoAssign, DDOD, RepPoints, R-CNN or SOLO, or torchvision FCOS, RetinaNet or R-CNN)"
        )
    names = dense.names or _assumed_names(dense.classes)
    named = dense.names is not None
    return Weights(dense.section, names, dense.state, None, kind, path, digest, named)


def _mmdetection(raw: Mapping[str, Any], file_name: str) -> DenseState | None:
    for recognize in (dense_state, mmdetection_two_stage, mmdetection_solo):
        if (state := recognize(raw, file_name)) is not None:
            return state
    return None


def _assumed_names(classes: int) -> list[str]:
    """Names for a checkpoint that has none: those of COCO where there are 80."""
    return list(COCO_NAMES) if classes == len(COCO_NAMES) else [f"class{i}" for i in range(classes)]


def read_weights(reference: str, files: CheckpointFiles | None = None) -> Weights:
    """The weights behind a reference; `files`: those of the command that are open already."""
    return (files or CheckpointFiles()).read(reference)


def open_model(reference: str, files: CheckpointFiles | None = None) -> Opened:
    """A detector for prediction or teaching: built as its weights say, loaded completely."""
    weights = read_weights(reference, files)
    if weights.section["name"] is None:
        raise UserError(f"{weights.path} holds a YOLOX of a size that has no name here")
    with naming(weights.path):
        student = parse_student(weights.section)
        detector = new_detector(student, weights.names)
        if weights.quantize is not None:
            fake_quantize(detector, weights.quantize.weight_bits)
        report = load_into(detector, weights.state, allow_class_mismatch=False)
        if weights.quantize is not None and report.missing:
            raise UserError(
                f"it is of a model trained for int8 and lacks {report.missing[0]}; use another copy of the file"
            )
    return Opened(detector.eval(), student, weights, report, reference)


def load_student(detector: Detector[Any, Any], reference: str, files: CheckpointFiles | None = None) -> LoadReport:
    """Start a student from a checkpoint; predictors of other classes are left untrained, and the report says so."""
    weights = read_weights(reference, files)
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
