"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from yoloxkd.config.strict import Strict
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.callbacks.plots import sheet_of
from yoloxkd.engine.checkpoint_parts import SavedPart, checked_state
from yoloxkd.engine.events import State
from yoloxkd.errors import Interrupted, UserError
from yoloxkd.metrics.measure import overall


class WandbConfig(Strict):
    """Where a run is logged and how much of it."""

    project: str = "yoloxkd"
    entity: str | None = Field(None, description="user or team; None: the account's own")
    run: str | None = Field(None, description="shown name; None: the name of the run's folder")
    tags: list[str] = Field(default_factory=list)
    mode: Literal["online", "offline"] | None = Field(
        None, description="offline writes into the run's folder for `wandb sync`; None: WANDB_MODE, else online"
    )
    every: int = Field(20, ge=1, description="steps between points of the step curves: each waits for the device")
    images: bool = Field(True, description="the sheets of predictions that callbacks.plots draws")


class SavedWandb(SavedPart):
    """Which W&B run this is."""

    run: str


class WeightsAndBiases(NamedCallback):
    """The run's recipe, losses, learning rate, metrics and images; a resumed run continues the same W&B run."""

    name = "wandb"
    Config = WandbConfig
    cfg: WandbConfig

    def __init__(self, config: Strict | None = None, **keys: Any) -> None:
        super().__init__(config, **keys)
        self.module: Any = self.needs("wandb", "wandb")
        self.session: Any = None
        self.run_id: str | None = None

    def on_fit_start(self, state: State) -> None:
        cfg = self.cfg
        self.check_folder_name(state.out)
        try:
            self.session = self.module.init(
                project=cfg.project,
                entity=cfg.entity,
                name=cfg.run or state.out.resolve().name,
                tags=cfg.tags or None,
                dir=str(state.out),
                mode=cfg.mode,
                id=self.run_id,
                resume="allow",
                config=state.recipe.model_dump(by_alias=True, mode="json"),
            )
        except self.module.Error as error:
            raise UserError(
                f"Weights & Biases could not be started: {' '.join(str(error).split()).rstrip('.')}; run 'wandb login', or use "
                "--set callbacks.wandb.mode=offline"
            ) from error
        self.run_id = self.session.id

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.run_id} if self.run_id else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.run_id = checked_state(SavedWandb, saved, self.name).run

    def on_step(self, state: State) -> None:
        # the last step of an epoch is logged with the epoch: a step may be logged once
        if state.iteration % self.cfg.every == 0 and state.step_in_epoch < state.iters_per_epoch:
            self.session.log(_step(state), step=state.iteration)

    def on_epoch_end(self, state: State) -> None:
        values = _step(state) | {f"loss/{name}": value for name, value in state.epoch_losses.items()}
        values |= {"epoch": state.epoch + 1, "loss": sum(state.epoch_losses.values())}
        values["images_per_s"] = state.images_per_second
        if state.evaluated == state.epoch:
            values |= {f"val/{name}": value for name, value in overall(state.metrics).items()}
        sheet = sheet_of(state.out, state.epoch + 1)
        if self.cfg.images and sheet.is_file():
            values["predictions"] = self.module.Image(str(sheet))
        self.session.log(values, step=state.iteration)

    def on_fit_end(self, state: State) -> None:
        best = state.best.metrics if state.best else state.metrics
        self.session.summary.update({f"best/{name}": value for name, value in overall(best).items()})
        self.session.finish()

    def on_exception(self, state: State, error: BaseException) -> None:
        if self.session is not None:
            self.session.finish(exit_code=130 if isinstance(error, Interrupted) else 1)


def _step(state: State) -> dict[str, float]:
    return {f"step/{name}": float(value.detach()) for name, value in state.losses.items()} | {"step/lr": state.lr}
