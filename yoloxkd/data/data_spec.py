"""The data YAML: where a data set is, its format, its class names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from yoloxkd.cache_folders import expand
from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import validate
from yoloxkd.config.strict import Strict
from yoloxkd.data import FORMATS
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.class_files import compare_class_files
from yoloxkd.data.formats.data_yaml import class_names, read_data_yaml
from yoloxkd.data.formats.format import SplitSource
from yoloxkd.data.formats.ultralytics import from_ultralytics, guess_format, is_flat
from yoloxkd.data.formats.values import bare_name, has_control
from yoloxkd.data.problems import Faults, shown
from yoloxkd.data.shapes import LEVELS, SHAPES, shapes_folder
from yoloxkd.errors import UserError, hint, nearest, nearest_file

SPLITS = ("train", "val", "test")
_KEYS = (
    "path",
    "format",
    "names",
    "download",
    "kpt_shape",
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
        names = [value] if isinstance(value, str) else value
        if isinstance(names, list) and any(isinstance(name, str) and has_control(name) for name in names):
            raise ValueError("should name files or folders, without control characters")
        if isinstance(names, list) and "" in names:
            raise ValueError("should name files or folders ('.' is the data set's own), and one name is empty")
        return names


class DataSpec(Strict):
    """A data set as its YAML describes it; `root` is the folder that the splits' paths start in."""

    path: str = Field(".", description="folder of the data set, relative to the YAML's own folder")
    format: str = Field("coco", description="format of the annotations")
    names: list[str] = Field(description="class names in label order: a list, or a mapping index -> name")
    train: SplitFiles | None = None
    val: SplitFiles | None = None
    test: SplitFiles | None = None
    download: str = Field("", description="how to get the data set, as the end of the sentence 'to get it, ...'")

    kpt_shape: tuple[int, int] | None = Field(
        None,
        description="YOLO: key points of each line after its box, [how many, 2 or 3 numbers each]; they are not read",
    )

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

    def image_folders(self) -> list[Path]:
        """The folders of all splits whose images are found by looking, with all folders below: those of YOLO sets."""
        parts = [getattr(self, split) for split in self.splits if self.format == "yolo"]
        places = dict.fromkeys(self.root / name for part in parts for name in part.images)
        return [place for place in places if place.is_dir()]

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        if has_control(value):
            raise ValueError("should name a folder, without control characters")
        return value

    @field_validator("names", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = class_names(value)
        bare = [bare_name(name) for name in names]
        if len(set(bare)) < len(bare):
            raise ValueError(f"should not hold '{shown(next(n for n in bare if bare.count(n) > 1))}' twice")
        return names

    @field_validator("kpt_shape", mode="before")
    @classmethod
    def _key_points(cls, value: Any) -> Any:
        if value is None:
            return None
        whole = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int for v in value)
        if not whole or not 1 <= value[0] <= 10_000 or value[1] not in (2, 3):
            raise ValueError("should be [NUMBER OF KEY POINTS, 2 or 3]")
        return value


def find_data(name_or_file: str | Path) -> DataSpec:
    """The data set of a YAML file, of a name in `cfg/data`, or `shapes` or `shapes-easy` (generated on first use).

    UserError: no such file or name; the YAML lacks a key or has an unknown one; the format is unknown; the data set's
    folder is not on disk.
    """
    name = str(name_or_file)
    if name in LEVELS:
        return _shapes(name)
    if name in cfg_names("data"):
        return _from_yaml(cfg_folder() / "data" / f"{name}.yaml", name, Path.cwd())
    file = expand(name)
    if file.is_file():
        return _from_yaml(file, name, file.resolve().parent)
    if file.suffix in (".yaml", ".yml"):
        tail = nearest_file(file) or f"; give an existing file, or '{SHAPES}', which needs no download"
        raise UserError(f"there is no data YAML {file}{tail}")
    raise UserError(f"unknown data set '{name}'; {nearest(name, [*cfg_names('data'), *LEVELS])} or give a data YAML")


@contextmanager
def _on_disk(where: str) -> Iterator[None]:
    """A path that the operating system cannot even look for (a name too long, a loop of links) as one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the {where} names {shown(repr(error.filename))}: {error.strerror or error}") from error


def load_split(spec: DataSpec, split: str, faults: Faults | None = None, *, masks: bool = False) -> DetectionData:
    """Read one split: train, val or test; instance masks only where asked for.

    UserError: the data set has no such split, or what its reader raises.
    """
    if split not in spec.splits:
        raise UserError(
            f"the data set {spec.name} has no split '{split}'; it has {', '.join(spec.splits)}{hint(split, spec.splits)}"
        )
    source = replace(_source(spec, getattr(spec, split)), masks=masks)
    faults = Faults() if faults is None else faults
    with _on_disk(f"data set {spec.name}"):
        if spec.format == "yolo":
            compare_class_files(source, spec.names, Path(spec.name), faults)
        return FORMATS[spec.format].read(source, spec.names, split, faults)


def _source(spec: DataSpec, files: SplitFiles) -> SplitSource:
    def paths_of(names: list[str]) -> tuple[Path, ...]:
        return tuple(spec.root / name for name in names)

    return SplitSource(
        spec.root,
        paths_of(files.images),
        paths_of([*files.annotations, *files.labels]),
        paths_of(files.lists),
        spec.kpt_shape,
    )


def _shapes(name: str) -> DataSpec:
    folder = shapes_folder(name)
    files = {s: {"images": f"images/{s}", "annotations": f"annotations/{s}.json"} for s in SPLITS}
    content = {"path": str(folder), "names": list(LEVELS[name].classes), **files}
    return _set_location(DataSpec.model_validate(content), name, folder)


def read_spec(file: Path, name: str, base: Path) -> DataSpec:
    """The description in a data YAML, wherever the data set itself is; `base` is where its `path` starts."""
    content = read_data_yaml(file)
    where = f"data set {name}"
    if is_flat(content, SPLITS):
        with _on_disk(where):
            content = from_ultralytics(content, SPLITS, where, base)
    content = {key: value for key, value in content.items() if value is not None}
    return validate(DataSpec, _with_format(content, where), where, known_keys=_KEYS)


def _from_yaml(file: Path, name: str, base: Path) -> DataSpec:
    spec = read_spec(file, name, base)
    where = f"data set {name}"
    if not spec.splits:
        raise UserError(f"the {where} lacks its splits: give at least one of train, val, test")
    for split in spec.splits:
        _check_keys(spec, split, where)
    if spec.kpt_shape is not None and spec.format != "yolo":
        raise UserError(f"the {where} is in the format {spec.format}, which reads no 'kpt_shape'; take it out")
    with _on_disk(where):
        root = base / expand(spec.path)
        there = root.is_dir()
    if not there:
        how = f"to get it, {' '.join(spec.download.split())}" if spec.download else "correct its 'path'"
        tail = f"; or use '{SHAPES}', which needs no download" if spec.download else ""
        raise UserError(f"the {where} is not on disk: there is no folder {root}; {how}{tail}")
    return _set_location(spec, name, root)


def _with_format(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The content with its format, said or guessed, and the format's own names where it gives none."""
    kind = content.get("format") or guess_format(content, SPLITS)
    if not isinstance(kind, str) or kind not in FORMATS:
        raise UserError(f"the {where} has the format '{shown(str(kind))}'; known formats: {', '.join(sorted(FORMATS))}")
    names = FORMATS[kind].names
    return {**({"names": list(names)} if names else {}), **content, "format": kind}


def _check_keys(spec: DataSpec, split: str, where: str) -> None:
    """Refuse a split that lacks what its format reads, or has what it does not."""
    format = FORMATS[spec.format]
    entries = {key: names for key, names in getattr(spec, split).model_dump(by_alias=True).items() if names}
    for key in format.required:
        if key not in entries:
            raise UserError(f"the {where} lacks the key '{split}.{key}'")
    for key, names in entries.items():
        if key not in format.required + format.optional:
            raise UserError(f"the {where} is in the format {spec.format}, which reads no '{split}.{key}'; take it out")
        if len(names) > 1 and key not in format.several:
            raise UserError(f"key '{split}.{key}' in the {where} should be one name, got {len(names)}")


def _set_location(spec: DataSpec, name: str, root: Path) -> DataSpec:
    spec._name, spec._root = name, root
    return spec
