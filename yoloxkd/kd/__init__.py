"""Knowledge distillation: the table of methods and their published defaults."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from yoloxkd.config.files import cfg_names
from yoloxkd.errors import UserError, nearest
from yoloxkd.kd.base import Distiller
from yoloxkd.kd.defaults import kd_file
from yoloxkd.kd.methods.crosskd import CrossKD
from yoloxkd.kd.methods.cwd import CWD
from yoloxkd.kd.methods.fgd import FGD
from yoloxkd.kd.methods.lad import LAD
from yoloxkd.kd.methods.ld import LD
from yoloxkd.kd.methods.mgd import MGD
from yoloxkd.kd.methods.pgd import PGD
from yoloxkd.kd.methods.pkd import PKD
from yoloxkd.kd.methods.response import Response

DISTILLERS: dict[str, type[Distiller]] = {
    "fgd": FGD,
    "pgd": PGD,
    "cwd": CWD,
    "mgd": MGD,
    "ld": LD,
    "response": Response,
    "pkd": PKD,
    "crosskd": CrossKD,
    "lad": LAD,
}


def split_name(name: str) -> tuple[str, str]:
    """`METHOD` or `METHOD@SET` -> method, set of defaults ("" where none is named)."""
    method, _, chosen = name.partition("@")
    if method not in DISTILLERS:
        known = [*DISTILLERS] if method == "none" else [*DISTILLERS, "none"]
        raise UserError(f"unknown distiller '{method}'; {nearest(method, known)}")
    if "@" in name and chosen not in kd_sets(method):
        known = [f"{method}@{each}" for each in kd_sets(method)]
        hint = nearest(name, known) if known else f"{method} has one set only: write {method}"
        raise UserError(f"unknown set of defaults '{name}'; {hint}")
    return method, chosen


def kd_sets(method: str) -> list[str]:
    """Sets of defaults that a method has beside its published ones: X of cfg/kd/<method>@X.yaml."""
    return [name.partition("@")[2] for name in cfg_names("kd") if name.startswith(f"{method}@")]


def kd_defaults(name: str, family: str) -> dict[str, Any]:
    """Keys of a method for a student of a detector family, by the later of these that has the key.

    name `METHOD`: `default` of cfg/kd/<method>.yaml, then `families.<family>` there. name `METHOD@SET`: after those,
    what `set_defaults` gives.
    """
    method, chosen = split_name(name)
    published = _keys(method, family)
    return published | set_defaults(method, chosen, family) if chosen else published


def set_defaults(method: str, chosen: str, family: str) -> dict[str, Any]:
    """What a set of defaults changes: `default` of cfg/kd/<method>@<set>.yaml, then `families.<family>` there."""
    return _keys(f"{method}@{chosen}", family)


def _keys(file: str, family: str) -> dict[str, Any]:
    written = kd_file(file)
    keys: dict[str, Any] = written["default"] | written["families"].get(family, {})
    return deepcopy(keys)
