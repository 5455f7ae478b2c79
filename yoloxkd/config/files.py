"""Paths of the YAML files that ship with the package."""

from __future__ import annotations

from pathlib import Path

from yoloxkd.errors import UserError


def cfg_folder() -> Path:
    """The folder of shipped YAML: inside the installed package, else `cfg/` of the checkout the package runs from.

    A `cfg` beside the package counts only with a `pyproject.toml` beside it: site-packages may hold somebody else's.
    """
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent
    if (package / "cfg").is_dir():
        return package / "cfg"
    if (checkout / "cfg").is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout / "cfg"
    raise UserError(f"the YAML files of yoloxkd are not at {package / 'cfg'}; install the package again")


def cfg_names(kind: str) -> list[str]:
    """Names of the shipped files of one kind (`models`, `kd`, `data`, `recipes`), sorted, without `.yaml`."""
    return sorted(file.stem for file in (cfg_folder() / kind).glob("*.yaml"))
