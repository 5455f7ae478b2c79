"""Python interface: `Trainer(...).fit()` and `Detector(...)`."""

from __future__ import annotations

from yoloxkd.api.detector import Detector
from yoloxkd.api.trainer import FitResult, Trainer
from yoloxkd.config.recipe import Recipe

__all__ = ["Detector", "FitResult", "Recipe", "Trainer"]
