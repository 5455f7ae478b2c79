"""Class-name files beside YOLO labels, compared with the data YAML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from yoloxkd.data.formats.data_yaml import class_names, read_data_yaml
from yoloxkd.data.formats.format import SplitSource
from yoloxkd.data.formats.ultralytics import is_flat
from yoloxkd.data.formats.values import bare_name
from yoloxkd.data.io.find_images import labels_folder
from yoloxkd.data.io.packed_strings import readable
from yoloxkd.data.io.text_files import decode_text, lines_of
from yoloxkd.data.problems import Faults, Place, shown
from yoloxkd.errors import UserError

KIND = "class files that contradict the names in the data YAML"
_LINES = ("classes.txt", "_darknet.labels")


def compare_class_files(source: SplitSource, names: Sequence[str], data_yaml: Path, faults: Faults) -> None:
    """Count files in the folders of labels and images, and above them up to the root, that give the labels other names.

    `data_yaml` is the file that `names` are from.
    """
    places = []
    for folder in _folders(source):
        for file, other_names in _class_files(folder, data_yaml):
            if note := _difference(other_names, names):
                places.append(Place(str(file), note=note))
    faults.add(KIND, places)


def _folders(source: SplitSource) -> list[Path]:
    """Without repetition, the nearest first."""
    starts = [*source.annotations]
    for place in source.images:
        folder = place if place.is_dir() else place.parent
        starts += [labels_folder(folder), folder]
    folders: dict[Path, None] = {}
    for start in starts:
        above = [folder for folder in start.parents if folder.is_relative_to(source.root)]
        folders.update(dict.fromkeys([start, *above]))
    return [folder for folder in folders if folder.is_dir()]


def _class_files(folder: Path, data_yaml: Path) -> Iterator[tuple[Path, list[str]]]:
    """Class files of a folder and their names; files that are none of these after all are passed over."""
    for file in sorted(folder.iterdir()):
        name = file.name.lower()
        if (name in _LINES or name.endswith(".names")) and (text := _text(file)) is not None:
            yield file, [line.strip() for line in lines_of(text) if line.strip()]
    notes = folder / "notes.json"
    if (text := _text(notes)) is not None and (other_names := _label_studio(text)):
        yield notes, other_names
    for file in (folder / "data.yaml", folder / "data.yml"):
        if (
            file.is_file()
            and not (data_yaml.is_file() and data_yaml.samefile(file))
            and (other_names := _other_yaml(file))
        ):
            yield file, other_names


def _text(file: Path) -> str | None:
    try:
        return decode_text(file.read_bytes(), str(file))
    except (OSError, UserError):
        return None


def _label_studio(text: str) -> list[str]:
    """`{"categories": [{"id": 0, "name": "cat"}, ...]}`"""
    try:
        rows: Any = json.loads(text)["categories"]
        return class_names({row["id"]: row["name"] for row in rows})
    except (ValueError, LookupError, TypeError, RecursionError):
        return []


def _other_yaml(file: Path) -> list[str]:
    """The names of a data YAML, where they are numbered: in other formats their order means nothing."""
    try:
        content = read_data_yaml(file)
        numbered = is_flat(content, ("train", "val", "test")) or content.get("format") == "yolo"
        return class_names(content.get("names")) if numbered else []
    except (UserError, ValueError):
        return []


def _difference(other_names: Iterable[str], names: Sequence[str]) -> str:
    """How other names contradict, in words; empty where they do not."""
    other = list(other_names)
    for label, (one, name) in enumerate(zip(other, names, strict=False)):
        other_encoding = readable(one) != one and not name.isascii()  # the same letters, for all that can be told
        if bare_name(one) != bare_name(name) and not other_encoding:
            return f"class {label} is '{shown(one)}' there, '{shown(name)}' in the data YAML"
    if len(other) != len(names):
        return f"it has {len(other)} classes, the data YAML {len(names)}"
    return ""
