"""Knowledge distillation for dense detectors: one file a method, one line in the table below."""

from __future__ import annotations

from typing import Any

from yoloxkd.config.files import cfg_folder
from yoloxkd.config.load import read_yaml
from yoloxkd.errors import UserError, nearest
from yoloxkd.kd.base import Distiller
from yoloxkd.kd.cwd import CWD
from yoloxkd.kd.fgd import FGD
from yoloxkd.kd.ld import LD
from yoloxkd.kd.mgd import MGD
from yoloxkd.kd.pgd import PGD

DISTILLERS: dict[str, type[Distiller]] = {"fgd": FGD, "pgd": PGD, "cwd": CWD, "mgd": MGD, "ld": LD}


def kd_defaults(method: str, family: str) -> dict[str, Any]:
    """Keys of a method for a student of a detector family: `default` of cfg/kd/<method>.yaml under the family's own."""
    if method not in DISTILLERS:
        raise UserError(f"unknown distiller '{method}'; {nearest(method, DISTILLERS)}")
    written = read_yaml(cfg_folder() / "kd" / f"{method}.yaml")
    defaults: dict[str, Any] = written["default"] | written["families"].get(family, {})
    return defaults
