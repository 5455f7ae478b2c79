"""yoloxkd: train a detector under the guidance of a better one, and export it as a file proven to be the same model.

Example:
    from yoloxkd import Detector, Trainer

    fit = Trainer(student="yolox-nano", teacher="teacher.pt", kd="pgd", data="my.yaml").fit()
    found = Detector(fit.best).predict("photo.jpg")[0]
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from yoloxkd.cache_folders import settle_libraries
from yoloxkd.version import __version__

__all__ = [
    "Callback",
    "Detection",
    "Detections",
    "Detector",
    "EvalResult",
    "FitResult",
    "Trainer",
    "UserError",
    "__version__",
]

settle_libraries()  # before any of them is imported

if TYPE_CHECKING:
    from yoloxkd.api import Detector, FitResult, Trainer
    from yoloxkd.detections import Detection, Detections
    from yoloxkd.engine.evaluate import EvalResult
    from yoloxkd.engine.events import Callback
    from yoloxkd.errors import UserError

_MODULES = {
    "Callback": "yoloxkd.engine.events",
    "Detection": "yoloxkd.detections",
    "Detections": "yoloxkd.detections",
    "Detector": "yoloxkd.api",
    "EvalResult": "yoloxkd.engine.evaluate",
    "FitResult": "yoloxkd.api",
    "Trainer": "yoloxkd.api",
    "UserError": "yoloxkd.errors",
}


def __getattr__(name: str) -> Any:
    # importing torch costs seconds: the command line and `import yoloxkd` must not pay for it
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    # with both, Python's traceback suggests the nearest name
    raise AttributeError(f"module 'yoloxkd' has no attribute '{name}'", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
