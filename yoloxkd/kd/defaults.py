"""Published defaults of a method (cfg/kd/METHOD.yaml), in Python as on the command line."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

from pydantic import Field

from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import read_yaml


@cache
def kd_file(name: str) -> dict[str, Any]:
    """What cfg/kd/<name>.yaml holds: `default`, and `families` with what each changes. Not to be written to."""
    return read_yaml(cfg_folder() / "kd" / f"{name}.yaml")


def published(method: str, key: str, **rules: Any) -> Any:
    """A field of a Config whose default is the one of cfg/kd/<method>.yaml; `rules` are pydantic's for a Field."""
    return Field(default_factory=lambda: deepcopy(kd_file(method)["default"][key]), **rules)
