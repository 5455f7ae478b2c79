"""Early stopping: end a run that no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from yoloxkd.config.strict import Strict
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.checkpoint_parts import Count, Finite, SavedPart, checked_state
from yoloxkd.engine.events import State
from yoloxkd.errors import UserError
from yoloxkd.metrics.measure import larger_is_better
from yoloxkd.viz.html_report import LossHistory, ReportPart


class EarlyStoppingConfig(Strict):
    """When to give up."""

    metric: str = Field("AP", description="a number of metrics.json over all classes")
    patience: int = Field(10, ge=1, description="epochs without an improvement; looked at after evaluations")
    min_delta: float = Field(0.0, ge=0, description="what counts as an improvement is more than this")


class BestValue(SavedPart):
    """What early stopping remembers: the best value, larger being better; its epoch, from 0; why the run was stopped."""

    best: Finite
    epoch: Count
    stopped: str = ""


class EarlyStopping(NamedCallback):
    """Sets `state.stop` after an evaluation that is `patience` epochs past the best one; the run then ends as finished."""

    name = "early_stopping"
    Config = EarlyStoppingConfig
    cfg: EarlyStoppingConfig

    def __init__(self, config: Strict | None = None, **keys: Any) -> None:
        super().__init__(config, **keys)
        self.best: BestValue | None = None

    def on_eval_end(self, state: State) -> None:
        value = self._value(state)
        if self.best is None and math.isnan(value):
            return  # nothing to improve on yet
        if self.best is None or value > self.best.best + self.cfg.min_delta:
            self.best = BestValue(best=value, epoch=state.epoch)
            return
        past = state.epoch - self.best.epoch
        if past >= self.cfg.patience and state.epoch + 1 < state.epochs:
            reason = f"{self.cfg.metric} has not improved for {past} epochs"
            self.best.stopped = reason
            state.stop = True
            state.say(f"early stopping after epoch {state.epoch + 1}: {reason} (best in epoch {self.best.epoch + 1})")

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else self.best.model_dump()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.best = checked_state(BestValue, saved, self.name)

    def report(self, state: State, history: LossHistory) -> ReportPart:
        stopped = self.best.stopped if self.best else ""
        return ReportPart(notes=[f"Stopped early: {stopped}."] if stopped else [])

    def _value(self, state: State) -> float:
        """The metric, larger is better."""
        name, key = self.cfg.metric, "callbacks.early_stopping.metric"
        value = larger_is_better(state.metrics, name, key)
        if state.metrics[name] < 0:
            raise UserError(f"{key} {name} cannot be watched: the validation set has nothing to measure it on")
        return value
