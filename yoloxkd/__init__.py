"""yoloxkd: train a detector under the guidance of a better one, and export it as a file proven to be the same model.

from yoloxkd import Trainer, Detector
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from yoloxkd.places import settle_libraries
from yoloxkd.version import __version__

__all__ = ["Detections", "Detector", "Trainer", "__version__"]

settle_libraries()  # before any of them is imported

if TYPE_CHECKING:
    from yoloxkd.api import Detector, Trainer
    from yoloxkd.types import Detections


def __getattr__(name: str) -> Any:
    # importing torch costs seconds: the command line and `import yoloxkd` must not pay for it
    if name in ("Trainer", "Detector"):
        from yoloxkd import api

        return getattr(api, name)
    if name == "Detections":
        from yoloxkd.types import Detections

        return Detections
    raise AttributeError(f"module 'yoloxkd' has no attribute '{name}'")
