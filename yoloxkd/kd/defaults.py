"""Published defaults of a method (cfg/kd/METHOD.yaml), in Python as on the command line."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

from pydantic import Field

from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml
from yoloxkd.errors import UserError, nearest
from yoloxkd.kd import DISTILLERS


@cache
def kd_file(name: str) -> dict[str, Any]:
    """What cfg/kd/<name>.yaml holds: `default`, and `families` with what each changes. Not to be written to."""
    return read_yaml(cfg_folder() / "kd" / f"{name}.yaml")


def published(method: str, key: str, **rules: Any) -> Any:
    """A field of a Config whose default is the one of cfg/kd/<method>.yaml; `rules` are pydantic's for a Field."""
    return Field(default_factory=lambda: deepcopy(kd_file(method)["default"][key]), **rules)


def split_name(name: str) -> tuple[str, str]:
    """`METHOD` or `METHOD@SET` -> method, set of defaults ("" where none is named)."""
    method, _, set_name = name.partition("@")
    if method not in DISTILLERS:
        names = [*DISTILLERS] if method == "none" else [*DISTILLERS, "none"]
        raise UserError(f"unknown distiller '{method}'; {nearest(method, names, say_all=40)}")
    if "@" in name and set_name not in kd_sets(method):
        names = [f"{method}@{each}" for each in kd_sets(method)]
        hint = nearest(name, names) if names else f"{method} has one set only: write {method}"
        raise UserError(f"unknown set of defaults '{name}'; {hint}")
    return method, set_name


def kd_sets(method: str) -> list[str]:
    """Sets of defaults that a method has beside its published ones: X of cfg/kd/<method>@X.yaml."""
    return [name.partition("@")[2] for name in cfg_names("kd") if name.startswith(f"{method}@")]


def kd_defaults(name: str, family: str) -> dict[str, Any]:
    """Keys of a method for a student of a detector family, by the later of these that has the key.

    name `METHOD`: `default` of cfg/kd/<method>.yaml, then `families.<family>` there. name `METHOD@SET`: after those,
    what `set_defaults` gives.
    """
    method, set_name = split_name(name)
    published = _keys(method, family)
    return published | set_defaults(method, set_name, family) if set_name else published


def set_defaults(method: str, set_name: str, family: str) -> dict[str, Any]:
    """What a set of defaults changes: `default` of cfg/kd/<method>@<set>.yaml, then `families.<family>` there."""
    return _keys(f"{method}@{set_name}", family)


def _keys(file: str, family: str) -> dict[str, Any]:
    written = kd_file(file)
    keys: dict[str, Any] = written["default"] | written["families"].get(family, {})
    return deepcopy(keys)
