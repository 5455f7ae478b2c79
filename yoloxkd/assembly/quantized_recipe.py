"""Recipe of a run that trains for int8: the student's own, shorter and gentler."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yoloxkd.assembly.models import CheckpointFiles
from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import merge, read_yaml, sections
from yoloxkd.config.recipe import Recipe
from yoloxkd.config.renamed import current_keys

OF_ANOTHER_RUN = ("student", "teacher", "kd", "quantize", "schedule")
"""Sections of the student's recipe that say nothing of the one that follows."""


def short_schedule() -> dict[str, Any]:
    """What `cfg/quantize.yaml` holds: keys of a recipe."""
    return read_yaml(cfg_folder() / "quantize.yaml")


def recipe_of_student(student: Path, files: CheckpointFiles) -> dict[str, Any]:
    """The recipe that lies beside a student's checkpoint, for its data, size and augmentation; else its input size alone."""
    beside = student.parent / "recipe.yaml"
    if beside.is_file():
        tree = current_keys(sections(read_yaml(beside), Recipe, "recipe"), note=False)
        return {key: value for key, value in tree.items() if key not in OF_ANOTHER_RUN}
    imgsz = files.read(str(student)).imgsz
    return {} if imgsz is None else {"train": {"imgsz": imgsz}}


def with_short_schedule(tree: dict[str, Any], *, note: bool = False) -> dict[str, Any]:
    """A recipe tree in the schedule of `cfg/quantize.yaml`; one that is for int8 already stays as it is.

    note  whether to tell the user which of the recipe's own keys give way
    """
    if (tree.get("quantize") or {}).get("kind") == "int8":
        return tree
    rest = {key: value for key, value in tree.items() if key != "schedule"}
    val = {key: value for key, value in (tree.get("val") or {}).items() if key != "interval"}
    short = merge(rest, short_schedule()) | {"val": val}
    if note:
        after = _dotted(short)
        changed = [f"{key} {value}" for key, value in _dotted(tree).items() if after.get(key, "unset") != value]
        if changed:
            logging.getLogger("yoloxkd").warning(
                "--quantize int8 has a schedule of its own (docs/quantization.md): it replaces %s of the recipe; options and "
                "--set win over it",
                ", ".join(changed),
            )
    return short


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def written_shortly(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe tree whose `quantize: int8` is a section."""
    quantize = tree.get("quantize")
    if quantize is None or isinstance(quantize, Mapping):
        return dict(tree)
    return dict(tree) | {"quantize": {"kind": quantize}}
