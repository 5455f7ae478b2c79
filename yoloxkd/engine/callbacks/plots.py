"""`plots/`: training curves, and predictions beside the ground truth, drawn during a run and at its end."""

from __future__ import annotations

import shutil
from pathlib import Path

from pydantic import Field

from yoloxkd.config.strict import Strict
from yoloxkd.engine.callbacks.csv_log import read_rows
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.engine.events import State


class PlotsConfig(Strict):
    """What is drawn, and how often."""

    interval: int | None = Field(None, ge=1, description="epochs between drawings; None: a tenth of the run")
    pictures: int = Field(6, ge=1, description="validation images on a sheet")
    conf: float = Field(0.3, ge=0, le=1, description="least score of a drawn detection")


class Plots(NamedCallback):
    """curves.png from results.csv; predictions.png from the present student (its averaged weights) on validation images.

    Sheets drawn during the run are kept as predictions-epoch-0010.png; predictions.png is the newest. A plot that cannot
    be drawn is a warning: the trained student matters more.
    """

    name = "plots"
    Config = PlotsConfig
    default = True
    cfg: PlotsConfig

    def on_epoch_end(self, state: State) -> None:
        every = self.cfg.interval or max(1, state.epochs // 10)
        if (state.epoch + 1) % every == 0:
            self._draw(state)

    def on_fit_end(self, state: State) -> None:
        self._draw(state)

    def _draw(self, state: State) -> None:
        from yoloxkd.viz.contact_sheet import draw_comparison
        from yoloxkd.viz.curves import draw_curves  # matplotlib costs a second to import

        try:
            rows = read_rows(state.out / "results.csv")
            sheet = sheet_of(state.out, int(rows[-1]["epoch"]))
            draw_curves(rows, state.out / "plots" / "curves.png")
            if not sheet.is_file():  # at the end of a run its last epoch may have been drawn already
                model = state.ema.module if state.ema else state.detector
                predictor = TorchPredictor(model, conf=self.cfg.conf, max_det=100, device=state.device)
                chosen = range(min(self.cfg.pictures, len(state.val)))
                draw_comparison(predictor, state.val, chosen, state.recipe.train.imgsz, sheet)
            shutil.copyfile(sheet, sheet.with_name("predictions.png"))
        except Exception as error:
            state.say(f"warning: plots were not drawn ({error})")


def sheet_of(out: Path, epoch: int) -> Path:
    """Where the sheet of predictions after an epoch (from 1) is kept."""
    return out / "plots" / f"predictions-epoch-{epoch:04d}.png"
