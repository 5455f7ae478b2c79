"""Recipes of the rows of the papers' comparisons, made from one table, cfg/kd-rows.yaml."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one detector.

    like                the shipped recipe of the same student, teacher and schedule
    methods             {method: its keys, beside its published defaults}
    source              table of a paper
    student, reported   what that table prints without a teacher, and with the method
    """

    like: str
    methods: dict[str, dict[str, Any]]
    source: str
    student: str
    reported: str

    def describe(self) -> str:
        """What the row reproduces, in one line."""
        return f"{self.source}: student {self.student}, with {' and '.join(self.methods)} {self.reported}"

    def tree(self) -> dict[str, Any]:
        """The recipe, as the YAML of a recipe file."""
        return read_yaml(cfg_folder() / "recipes" / f"{self.like}.yaml") | {"kd": deepcopy(self.methods)}


@cache
def written_rows() -> dict[str, Row]:
    """Every row of the table by its name, TABLE-DETECTOR-METHOD."""
    rows = {}
    for table, written in read_yaml(cfg_folder() / "kd-rows.yaml").items():
        for detector, entry in written["detectors"].items():
            keys = written.get("keys", {}) | entry.get("keys", {})
            for name, reported in entry["reported"].items():
                methods = {method: keys.get(method, {}) for method in name.split("+")}
                row = Row(entry["like"], methods, written["source"], str(entry["student"]), str(reported))
                rows[f"{table}-{detector}-{name}"] = row
    return rows


def recipe_rows() -> dict[str, Row]:
    """The rows whose student and teacher have a shipped recipe."""
    shipped = set(cfg_names("recipes"))
    return {name: row for name, row in written_rows().items() if row.like in shipped}
