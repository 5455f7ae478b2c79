"""Recipe keys and names of losses of earlier versions, read under their old spelling; of keys with a note."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

RENAMED = {
    "student.centre_sampling": "student.center_sampling",
    "student.centreness_on_reg": "student.centerness_on_reg",
    "augment.grey": "augment.gray",
    "kd.mgd.hidden": "kd.mgd.mask_ratio",
}
"""Old dotted key -> the key of this version. The old ones go with version 0.3."""
OLD_FIELDS = {old.rpartition(".")[2]: new.rpartition(".")[2] for old, new in RENAMED.items()}

RENAMED_TERMS = {f"{branch}_att": f"{branch}_attention" for branch in ("cls", "reg", "neck")}
"""Old term of a loss -> the term of this version, in results.csv and in last.pt."""


def current_column(name: str) -> str:
    """The column of this version for one of a results.csv."""
    return "/".join(RENAMED_TERMS.get(part, part) for part in name.split("/"))


def current_key(dotted: str) -> str:
    """The key of this version for a dotted key that a user typed; says so where it differs."""
    new = RENAMED.get(dotted)
    if new is None:
        return dotted
    _note(dotted, new)
    return new


def current_keys(tree: Mapping[str, Any], *, note: bool = True) -> dict[str, Any]:
    """A recipe tree with the keys of this version.

    Args:
        tree: sections of a recipe by name; not changed.
        note: whether to tell the user which old keys were read.
    """
    out = dict(tree)
    for old, new in RENAMED.items():
        *sections, key = old.split(".")
        out = _with_current(out, sections, key, new if note else "")
    return out


def _with_current(tree: Mapping[str, Any], sections: list[str], key: str, new: str) -> dict[str, Any]:
    """The tree with a key below some sections renamed."""
    if not sections:
        if key in tree and new:
            _note(key, new)
        return {OLD_FIELDS[key] if name == key else name: value for name, value in tree.items()}
    first, *rest = sections
    inner = tree.get(first)
    return dict(tree) | ({first: _with_current(inner, rest, key, new)} if isinstance(inner, Mapping) else {})


@functools.cache
def _note(old: str, new: str) -> None:
    logging.getLogger("yoloxkd").warning("key '%s' is now called '%s'; the old name will go", old, new)
