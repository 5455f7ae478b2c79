"""Knowledge distillation: the table of methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yoloxkd.table import Table

if TYPE_CHECKING:
    from yoloxkd.kd.base import Distiller

DISTILLERS: Table[type[Distiller]] = Table(
    "distiller",
    {
        "fgd": "yoloxkd.kd.methods.fgd:FGD",
        "pgd": "yoloxkd.kd.methods.pgd:PGD",
        "cwd": "yoloxkd.kd.methods.cwd:CWD",
        "mgd": "yoloxkd.kd.methods.mgd:MGD",
        "ld": "yoloxkd.kd.methods.ld:LD",
        "fgfi": "yoloxkd.kd.methods.fgfi:FGFI",
        "defeat": "yoloxkd.kd.methods.defeat:DeFeat",
        "gid": "yoloxkd.kd.methods.gid:GID",
        "fkd": "yoloxkd.kd.methods.fkd:FKD",
        "frs": "yoloxkd.kd.methods.frs:FRS",
        "tadf": "yoloxkd.kd.methods.tadf:TADF",
        "chen": "yoloxkd.kd.methods.chen:Chen",
        "mimic": "yoloxkd.kd.methods.mimic:Mimic",
        "response": "yoloxkd.kd.methods.response:Response",
        "pkd": "yoloxkd.kd.methods.pkd:PKD",
        "crosskd": "yoloxkd.kd.methods.crosskd:CrossKD",
        "lad": "yoloxkd.kd.methods.lad:LAD",
    },
)
"""Method, as `--kd` takes it -> its class."""
