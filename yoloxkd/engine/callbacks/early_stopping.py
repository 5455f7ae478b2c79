"""Early stopping: end a run that no longer improves."""

from __future__ import annotations

from pydantic import Field

from yoloxkd.config.strict import Strict
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.events import State
from yoloxkd.errors import UserError, nearest
from yoloxkd.metrics.measure import overall

SMALLER_IS_BETTER = ("MR",)


class EarlyStoppingConfig(Strict):
    """When to give up."""

    metric: str = Field("AP", description="a number of metrics.json over all classes")
    patience: int = Field(10, ge=1, description="epochs without an improvement; looked at after evaluations")
    min_delta: float = Field(0.0, ge=0, description="what counts as an improvement is more than this")


class EarlyStopping(NamedCallback):
    """Sets `state.stop` after an evaluation that is `patience` epochs past the best one; the run then ends as finished.

    Its state is in `state.extra` and so survives a resume.
    """

    name = "early_stopping"
    Config = EarlyStoppingConfig
    cfg: EarlyStoppingConfig

    def on_eval_end(self, state: State) -> None:
        value = self._value(state)
        kept = state.extra.get(self.name)
        if kept is None or value > kept["best"] + self.cfg.min_delta:
            state.extra[self.name] = {"best": value, "epoch": state.epoch}
            return
        past = state.epoch - kept["epoch"]
        if past >= self.cfg.patience and state.epoch + 1 < state.epochs:
            reason = f"{self.cfg.metric} has not improved for {past} epochs"
            state.extra[self.name] = kept | {"stopped": reason}
            state.stop = True
            state.say(f"early stopping after epoch {state.epoch + 1}: {reason} (best in epoch {kept['epoch'] + 1})")

    def _value(self, state: State) -> float:
        """The metric, larger is better."""
        metrics, name = overall(state.metrics), self.cfg.metric
        if name not in metrics:
            raise UserError(f"callbacks.early_stopping.metric '{name}' is not measured here; {nearest(name, metrics)}")
        if metrics[name] < 0:
            raise UserError(
                f"callbacks.early_stopping.metric {name} cannot be watched: the validation set has nothing to measure it on"
            )
        return -metrics[name] if name in SMALLER_IS_BETTER else metrics[name]
