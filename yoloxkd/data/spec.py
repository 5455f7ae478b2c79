"""The data YAML: where a data set is, which format it has, what its classes are called."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml, validate
from yoloxkd.config.strict import Strict
from yoloxkd.data import FORMATS
from yoloxkd.data.faults import Faults
from yoloxkd.data.formats import SplitSource
from yoloxkd.data.records import DetectionData
from yoloxkd.data.shapes import CLASSES, SHAPES, shapes_folder
from yoloxkd.data.ultralytics import from_ultralytics, guess_format, is_flat
from yoloxkd.errors import UserError, nearest
from yoloxkd.places import expand

SPLITS = ("train", "val", "test")
_KEYS = (
    "path",
    "format",
    "names",
    "download",
    *SPLITS,
    *(f"{s}.{k}" for s in SPLITS for k in ("images", "annotations", "labels", "list")),
)


class SplitFiles(Strict):
    """A split's files and folders, relative to the data set's path; each key takes one name or several."""

    images: list[str] = Field([], description="image folders; for YOLO also list files")
    annotations: list[str] = Field([], description="annotation file, for VOC the folder of XML files")
    labels: list[str] = Field([], description="YOLO: folder of label files, where they are not beside the images")
    lists: list[str] = Field([], alias="list", description="VOC: the ImageSets file")

    @field_validator("*", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class DataSpec(Strict):
    """A data set as its YAML describes it; `root` is the folder that the splits' paths start in."""

    path: str = Field(".", description="folder of the data set, relative to the YAML's own folder")
    format: str = Field("coco", description="format of the annotations")
    names: list[str] = Field(description="class names in label order: a list, or a mapping index -> name")
    train: SplitFiles | None = None
    val: SplitFiles | None = None
    test: SplitFiles | None = None
    download: str = Field("", description="how to get the data set, as the end of the sentence 'to get it, ...'")

    _root: Path = PrivateAttr(default=Path())
    _name: str = PrivateAttr(default="")

    @property
    def root(self) -> Path:
        return self._root

    @property
    def name(self) -> str:
        """What the user called the data set: a name or a file."""
        return self._name

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if getattr(self, split) is not None]

    @field_validator("names", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) != set(range(len(value))):
                raise ValueError(f"as a mapping should have the indices 0 to {len(value) - 1}")
            value = [value[index] for index in range(len(value))]
        if not isinstance(value, list) or not value:
            raise ValueError("should be a list of class names")
        names = [name if isinstance(name, str) else str(name) for name in value]  # YAML reads a class `1` as a number
        if len(set(names)) < len(names):
            raise ValueError(f"should not hold '{next(n for n in names if names.count(n) > 1)}' twice")
        return names


def find_data(name_or_file: str | Path) -> DataSpec:
    """The data set of a YAML file, of a name in `cfg/data`, or `shapes` (generated on first use).

    UserError: no such file or name; the YAML lacks a key or has an unknown one; the format is unknown; the data set's
    folder is not on disk.
    """
    name = str(name_or_file)
    if name == SHAPES:
        return _shapes()
    if name in cfg_names("data"):
        return _from_yaml(cfg_folder() / "data" / f"{name}.yaml", name, Path.cwd())
    file = expand(name)
    if file.is_file():
        return _from_yaml(file, name, file.resolve().parent)
    if file.suffix in (".yaml", ".yml"):
        raise UserError(f"there is no data YAML {file}; give an existing file, or '{SHAPES}', which needs no download")
    raise UserError(f"unknown data set '{name}'; {nearest(name, [*cfg_names('data'), SHAPES])} or give a data YAML")


def load_split(spec: DataSpec, split: str, faults: Faults | None = None) -> DetectionData:
    """Read one split: train, val or test. UserError: the data set has no such split, or what its reader raises."""
    if split not in spec.splits:
        raise UserError(f"the data set {spec.name} has no split '{split}'; it has {', '.join(spec.splits)}")
    source = _source(spec, getattr(spec, split))
    return FORMATS[spec.format].read(source, spec.names, split, Faults() if faults is None else faults)


def _source(spec: DataSpec, files: SplitFiles) -> SplitSource:
    def placed(names: list[str]) -> tuple[Path, ...]:
        return tuple(spec.root / name for name in names)

    return SplitSource(
        spec.root, placed(files.images), placed([*files.annotations, *files.labels]), placed(files.lists)
    )


def _shapes() -> DataSpec:
    folder = shapes_folder()
    files = {s: {"images": f"images/{s}", "annotations": f"annotations/{s}.json"} for s in SPLITS}
    return _placed(DataSpec.model_validate({"path": str(folder), "names": list(CLASSES), **files}), SHAPES, folder)


def read_spec(file: Path, name: str, base: Path) -> DataSpec:
    """The description in a data YAML, wherever the data set itself is; `base` is where its `path` starts."""
    content = read_yaml(file)
    where = f"data set {name}"
    if is_flat(content, SPLITS):
        content = from_ultralytics(content, SPLITS, where, base)
    content = {key: value for key, value in content.items() if value is not None}
    return validate(DataSpec, _with_format(content, where), where, known=_KEYS)


def _from_yaml(file: Path, name: str, base: Path) -> DataSpec:
    spec = read_spec(file, name, base)
    where = f"data set {name}"
    if not spec.splits:
        raise UserError(f"the {where} lacks its splits: give at least one of train, val, test")
    for split in spec.splits:
        _check_keys(spec, split, where)
    root = base / expand(spec.path)
    if not root.is_dir():
        how = f"to get it, {' '.join(spec.download.split())}" if spec.download else "correct its 'path'"
        tail = f"; or use '{SHAPES}', which needs no download" if spec.download else ""
        raise UserError(f"the {where} is not on disk: there is no folder {root}; {how}{tail}")
    return _placed(spec, name, root)


def _with_format(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content with its format, said or guessed, and the format's own names where it gives none."""
    kind = content.get("format") or guess_format(content, SPLITS)
    if kind not in FORMATS:
        raise UserError(f"the {where} has the format '{kind}'; known formats: {', '.join(sorted(FORMATS))}")
    names = FORMATS[kind].names
    return {**({"names": list(names)} if names else {}), **content, "format": kind}


def _check_keys(spec: DataSpec, split: str, where: str) -> None:
    """Refuse a split that lacks what its format reads, or has what it does not."""
    format = FORMATS[spec.format]
    given = {key: names for key, names in getattr(spec, split).model_dump(by_alias=True).items() if names}
    for key in format.required:
        if key not in given:
            raise UserError(f"the {where} lacks the key '{split}.{key}'")
    for key, names in given.items():
        if key not in format.required + format.optional:
            raise UserError(f"the {where} is in the format {spec.format}, which reads no '{split}.{key}'; take it out")
        if len(names) > 1 and key not in format.several:
            raise UserError(f"key '{split}.{key}' in the {where} should be one name, got {len(names)}")


def _placed(spec: DataSpec, name: str, root: Path) -> DataSpec:
    spec._name, spec._root = name, root
    return spec
