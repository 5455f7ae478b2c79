"""Detectors. `DETECTORS` maps a family's name to its class; it is filled on first use, so that reading a table of names
or downloading a file does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yoloxkd.nn.detector import Detector

    DETECTORS: dict[str, type[Detector]]


def __getattr__(name: str) -> Any:
    if name != "DETECTORS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from yoloxkd.nn.dense.atss import ATSS
    from yoloxkd.nn.dense.fcos import FCOS
    from yoloxkd.nn.dense.gfl import GFL
    from yoloxkd.nn.dense.yolox import YOLOX

    table: dict[str, type[Detector]] = {"yolox": YOLOX, "fcos": FCOS, "gfl": GFL, "atss": ATSS}
    globals()[name] = table
    return table
