"""The data YAML: where a data set is, which format it has, what its classes are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml, validate
from yoloxkd.config.strict import Strict
from yoloxkd.data import FORMATS
from yoloxkd.data.records import DetectionData
from yoloxkd.data.shapes import CLASSES, SHAPES, shapes_folder
from yoloxkd.errors import UserError, nearest

SPLITS = ("train", "val", "test")
_KEYS = (
    "path",
    "format",
    "names",
    "download",
    *SPLITS,
    *(f"{s}.{k}" for s in SPLITS for k in ("images", "annotations")),
)


class SplitFiles(Strict):
    """A split's image folder and annotation file, relative to the data set's path."""

    images: str
    annotations: str


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
    file = Path(name).expanduser()
    if file.is_file():
        return _from_yaml(file, name, file.resolve().parent)
    if file.suffix in (".yaml", ".yml"):
        raise UserError(f"there is no data YAML {file}; give an existing file, or '{SHAPES}', which needs no download")
    raise UserError(f"unknown data set '{name}'; {nearest(name, [*cfg_names('data'), SHAPES])} or give a data YAML")


def load_split(spec: DataSpec, split: str) -> DetectionData:
    """Read one split: train, val or test. UserError: the data set has no such split, or what its reader raises."""
    if split not in spec.splits:
        raise UserError(f"the data set {spec.name} has no split '{split}'; it has {', '.join(spec.splits)}")
    files: SplitFiles = getattr(spec, split)
    return FORMATS[spec.format](spec.root / files.images, spec.root / files.annotations, spec.names, split)


def _shapes() -> DataSpec:
    folder = shapes_folder()
    files = {s: {"images": f"images/{s}", "annotations": f"annotations/{s}.json"} for s in SPLITS}
    return _placed(DataSpec.model_validate({"path": str(folder), "names": list(CLASSES), **files}), SHAPES, folder)


def _from_yaml(file: Path, name: str, base: Path) -> DataSpec:
    content = read_yaml(file)
    where = f"data set {name}"
    kind = str(content.get("format", "coco"))
    flat = [split for split in SPLITS if isinstance(content.get(split), str | list)]
    if kind not in FORMATS or ("format" not in content and flat):
        said = (
            f"the format '{kind}'" if "format" in content else f"'{flat[0]}' without annotations, as YOLO's format does"
        )
        raise UserError(f"the {where} has {said}; known formats: {', '.join(sorted(FORMATS))}")
    if flat:
        raise UserError(f"the {where} should say '{flat[0]}: {{images: FOLDER, annotations: FILE}}', not a bare path")
    spec = validate(DataSpec, content, where, known=_KEYS)
    if not spec.splits:
        raise UserError(f"the {where} lacks its splits: give at least one of train, val, test")
    root = base / Path(spec.path).expanduser()
    if not root.is_dir():
        how = f"to get it, {' '.join(spec.download.split())}" if spec.download else "correct its 'path'"
        tail = f"; or use '{SHAPES}', which needs no download" if spec.download else ""
        raise UserError(f"the {where} is not on disk: there is no folder {root}; {how}{tail}")
    return _placed(spec, name, root)


def _placed(spec: DataSpec, name: str, root: Path) -> DataSpec:
    spec._name, spec._root = name, root
    return spec
