"""Callbacks of a run, each in its own file; `CALLBACKS` are those that a recipe can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yoloxkd.table import Table

if TYPE_CHECKING:
    from yoloxkd.engine.callbacks.named import NamedCallback

CALLBACKS: Table[type[NamedCallback]] = Table(
    "callback",
    {
        "early_stopping": "yoloxkd.engine.callbacks.early_stopping:EarlyStopping",
        "learning_rate": "yoloxkd.engine.callbacks.learning_rate:LearningRateLog",
        "kd_gradients": "yoloxkd.engine.callbacks.kd_gradients:KDGradients",
        "plots": "yoloxkd.engine.callbacks.plots:Plots",
        "tensorboard": "yoloxkd.engine.callbacks.tensorboard:TensorBoard",
        "wandb": "yoloxkd.engine.callbacks.wandb:WeightsAndBiases",
        "report": "yoloxkd.engine.callbacks.html_report:HtmlReport",
    },
)
"""Key under `callbacks` in a recipe -> the callback."""
