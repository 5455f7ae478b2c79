"""`metrics.json`, the mark of a finished run."""

from __future__ import annotations

import json

from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.events import Callback, State


class FinalMetrics(Callback):
    """Writes the numbers of the best student when everything else is done: a run without this file can be resumed."""

    def on_fit_end(self, state: State) -> None:
        assert state.best is not None  # of every run that comes to its end
        final = state.best.metrics | {"epoch": state.best.epoch + 1, "split": state.recipe.val.split}
        write_text(state.out / "metrics.json", json.dumps(final, indent=2) + "\n")
