"""The callbacks of a run, each in its own file; `CALLBACKS` are those that a recipe can name."""

from __future__ import annotations

from yoloxkd.engine.callbacks.early_stopping import EarlyStopping
from yoloxkd.engine.callbacks.html_report import HtmlReport
from yoloxkd.engine.callbacks.learning_rate import LearningRateLog
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.callbacks.plots import Plots
from yoloxkd.engine.callbacks.tensorboard import TensorBoard
from yoloxkd.engine.callbacks.wandb import WeightsAndBiases

__all__ = ["CALLBACKS", "EarlyStopping", "HtmlReport", "LearningRateLog", "Plots", "TensorBoard", "WeightsAndBiases"]

CALLBACKS: dict[str, type[NamedCallback]] = {
    "early_stopping": EarlyStopping,
    "learning_rate": LearningRateLog,
    "plots": Plots,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "report": HtmlReport,
}
"""Key under `callbacks` in a recipe -> the callback."""
