"""Images and categories of a COCO file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yoloxkd.data.box_table import UNWANTED, ImageColumns
from yoloxkd.data.formats.values import (
    NO_ID,
    ClassNames,
    IdCodes,
    bare_name,
    id_key,
    is_plain,
    size_px,
    typed,
    written_id,
)
from yoloxkd.data.io.find_images import locate
from yoloxkd.data.io.packed_strings import Strings
from yoloxkd.data.problems import Faults, Place, shown
from yoloxkd.errors import UserError


class ImageRows:
    """The list `images` of a file, gathered portion by portion."""

    def __init__(self, file: Path, codes: IdCodes) -> None:
        self.file, self.count = file, 0
        self._coder = codes
        self._parts: list[np.ndarray] = []
        self._keys: list[int | str] = []
        self._sizes: list[tuple[int, int]] = []
        self._names: list[str] = []

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """UserError: a row has no usable id, size or file name; it is named by its place in the list."""
        self._parts.append(self._coder.of([row.get("id") for row in rows]))
        for row in rows:
            name = row.get("file_name")
            if not isinstance(name, str) or not name.strip():
                raise self._fault(row, "file_name", "which is not a text that names a file")
            if id_key(row.get("id")) is None:
                raise self._fault(row, "id", "which is not a whole number or a text")
            height, width = size_px(row.get("height")), size_px(row.get("width"))
            if height is None or width is None:
                key = "width" if width is None else "height"
                raise self._fault(row, key, "which is not a positive whole number")
            self._keys.append(written_id(row["id"]))
            self._sizes.append((height, width))
            self._names.append(name)
            self.count += 1

    def _fault(self, row: dict[str, Any], key: str, what: str) -> UserError:
        name = row.get("file_name")
        at = f"images[{self.count}]" + (f" ({shown(name)})" if isinstance(name, str) and key != "file_name" else "")
        problem = f"has the {key} {typed(row[key])}, {what}" if key in row else f"is an image without a usable '{key}'"
        return UserError(f"{at} of the annotation file {self.file} {problem}; correct it")

    @property
    def codes(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *self._parts])

    def image_columns(self, folder: Path, faults: Faults) -> ImageColumns:
        """UserError: there is none, or two have the same id."""
        if not self.count:
            raise UserError(f"the annotation file {self.file} lists no image")
        codes = self.codes
        values, first, counts = np.unique(codes, return_index=True, return_counts=True)
        if len(values) < len(codes):
            most = int(counts.argmax())
            others = np.flatnonzero(codes == values[most]).tolist()
            raise UserError(
                f"the annotation file {self.file} gives the image id {typed(self._keys[first[most]])} to {counts[most]} "
                f"images, of which images[{others[0]}] and images[{others[1]}]; ids must be unique"
            )
        numbered = bool(is_plain(codes).all())
        plain = numbered and set(map(type, self._keys)) <= {int}
        return ImageColumns(
            codes if numbered else np.arange(1, len(codes) + 1),
            Strings(locate([str(folder / name) for name in self._names], faults)),
            np.array(self._sizes, np.int32),
            None if plain else Strings(json.dumps(key) for key in self._keys),
        )


@dataclass(slots=True)
class Categories:
    """Code of a category's id -> label, UNWANTED where it is not in names; the number of each label; and as written."""

    label_of: dict[int, int]
    ids: np.ndarray
    keys: list[int | str] | None


def match_categories(
    rows: Sequence[dict[str, Any]], names: Sequence[str], file: Path, codes: IdCodes, faults: Faults
) -> Categories:
    """Find the categories by name among `names`. A name that the file does not have gets a free id.

    UserError: a category has no usable id or name, two have the same id, none of them is in `names`.
    """
    table = ClassNames(names)
    labels: dict[int, int] = {}
    id_of_label: dict[int, int | str] = {}  # label -> the id as written
    loose, twice = [], []
    for place, row in enumerate(rows):
        at = f"categories[{place}]"
        name, code = _category_name(row), codes.code(row.get("id"))
        if name is None or code == NO_ID:
            key = "name" if name is None else "id"
            raise UserError(
                f"{at} of the annotation file {file} is a category without a usable '{key}', but {typed(row.get(key))}; "
                "correct it"
            )
        label = table.label(name)
        if labels.setdefault(code, UNWANTED if label is None else label) != (UNWANTED if label is None else label):
            raise UserError(
                f"{at} of the annotation file {file} has the id {typed(row['id'])} of a category before it; ids must be unique"
            )
        if label is None:
            continue
        if name not in table.exact:
            loose.append(Place(str(file), note=f"{at} is '{shown(name)}', taken for '{shown(names[label])}'"))
        if label in id_of_label and id_of_label[label] != written_id(row["id"]):
            twice.append(Place(str(file), note=f"{at} is '{shown(name)}' too"))
        id_of_label.setdefault(label, written_id(row["id"]))
    if not id_of_label:
        raise _none_in_common(rows, names, file)
    faults.add("category names that differ from names in spaces or Unicode form", loose)
    faults.add("categories that have the name of one before, taken as one class", twice)
    if faults.gather:
        missing = [Place(str(file), note=f"'{shown(names[k])}'") for k in range(len(names)) if k not in id_of_label]
        faults.add("names that are no category of the file", missing)
    return _with_ids(labels, id_of_label, len(names))


def _category_name(row: dict[str, Any]) -> str | None:
    name = row.get("name")
    if isinstance(name, int | float) and not isinstance(name, bool):
        return str(name)
    return name if isinstance(name, str) and bare_name(name) else None


def _none_in_common(rows: Sequence[dict[str, Any]], names: Sequence[str], file: Path) -> UserError:
    file_categories = ", ".join(shown(str(c["name"])) for c in rows[:20]) or "none"
    yaml_names = ", ".join(map(shown, names[:20]))
    return UserError(
        f"none of the names in the data YAML ({yaml_names}) is a category of {file} ({file_categories}); "
        "make them agree"
    )


def _with_ids(labels: dict[int, int], id_of_label: dict[int, int | str], count: int) -> Categories:
    """Give classes that the file lacks the ids after its largest."""
    codes = np.array(list(labels), np.int64)
    free = int(codes.max(initial=0)) + 1
    keys: list[int | str] = []
    for label in range(count):
        keys.append(id_of_label.get(label, free))
        free += label not in id_of_label
    if is_plain(codes).all() and set(map(type, keys)) <= {int}:
        return Categories(labels, np.array(keys, np.int64), None)
    return Categories(labels, np.arange(1, count + 1), keys)
