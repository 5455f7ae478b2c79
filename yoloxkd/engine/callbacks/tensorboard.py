"""TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from yoloxkd.config.load import write_yaml
from yoloxkd.config.strict import Strict
from yoloxkd.data.io.images import read_image
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.callbacks.plots import sheet_of
from yoloxkd.engine.events import State
from yoloxkd.metrics.measure import overall


class TensorBoardConfig(Strict):
    """How much is logged."""

    every: int = Field(20, ge=1, description="steps between points of the step curves: each waits for the device")
    images: bool = Field(True, description="the sheets of predictions that callbacks.plots draws")


class TensorBoard(NamedCallback):
    """Event files in `tensorboard/`: losses and learning rate of steps, means, metrics and images of epochs.

    A resumed run continues the curves; points past the checkpoint, of a run that was killed, are purged.
    """

    name = "tensorboard"
    Config = TensorBoardConfig
    cfg: TensorBoardConfig

    def __init__(self, config: Strict | None = None, **keys: Any) -> None:
        super().__init__(config, **keys)
        self.module = self.needs("torch.utils.tensorboard", "tensorboard")
        self.writer: Any = None

    def on_fit_start(self, state: State) -> None:
        self.check_folder_name(state.out)
        purge = state.iteration + 1 if state.iteration else None
        self.writer = self.module.SummaryWriter(str(state.out / "tensorboard"), purge_step=purge)
        if not state.iteration:
            text = write_yaml(state.recipe.model_dump(by_alias=True, mode="json"))
            text = text.encode(errors="backslashreplace").decode()
            self.writer.add_text("recipe", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def on_step(self, state: State) -> None:
        if state.iteration % self.cfg.every == 0:
            for name, value in state.losses.items():
                self.writer.add_scalar(f"step/{name}", float(value.detach()), state.iteration)
            self.writer.add_scalar("step/lr", state.lr, state.iteration)

    def on_eval_start(self, state: State) -> None:
        self.writer.flush()

    def on_epoch_end(self, state: State) -> None:
        step = state.iteration
        for name, value in state.epoch_losses.items():
            self.writer.add_scalar(f"loss/{name}", value, step)
        self.writer.add_scalar("loss", sum(state.epoch_losses.values()), step)
        self.writer.add_scalar("images_per_s", state.images_per_second, step)
        if state.evaluated == state.epoch:
            for metric, value in overall(state.metrics).items():
                self.writer.add_scalar(f"val/{metric}", value, step)
        sheet = sheet_of(state.out, state.epoch + 1)
        if self.cfg.images and sheet.is_file():
            self.writer.add_image("predictions", read_image(str(sheet))[0], step, dataformats="HWC")
        self.writer.flush()

    def on_fit_end(self, state: State) -> None:
        self.writer.close()

    def on_exception(self, state: State, error: BaseException) -> None:
        if self.writer is not None:
            self.writer.close()
