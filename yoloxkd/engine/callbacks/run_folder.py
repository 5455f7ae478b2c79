"""The run folder at its start: resolved recipe and environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from yoloxkd.engine.atomic import clear_leftovers, write_text
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.provenance import now, provenance, read_environment
from yoloxkd.errors import Interrupted


class RunFolder(Callback):
    """Makes the folder when training is about to start, so that a run refused before leaves nothing behind.

    recipe_text  YAML of the resolved recipe

    `environment.json` holds what `provenance` says of the first start; each resume adds one such entry to its list
    `resumed`.
    """

    def __init__(self, recipe_text: str) -> None:
        self.recipe_text = recipe_text
        self.about: dict[str, Any] = {}

    def on_fit_start(self, state: State) -> None:
        file = state.out / "environment.json"
        here = provenance(state.device)
        if state.iteration and file.is_file():
            about = read_environment(file).model_dump()
            about["resumed"] = [*about["resumed"], here | {"epoch": state.epoch + 1}]
        else:
            about = here
        self.about = about | {key: state.extra[key] for key in ("backbone", "kd") if key in state.extra}
        clear_leftovers(state.out)
        write_text(state.out / "recipe.yaml", self.recipe_text)
        _write(file, self.about)
        state.say(f"run folder: {state.out}")  # the first line since the folder is there: train.log begins with it

    def on_fit_end(self, state: State) -> None:
        _write(state.out / "environment.json", self.about | {"finished": now()})
        if str(state.extra.get("backbone", "")).startswith("warning"):
            state.say(state.extra["backbone"])  # once more beside the result that it changes

    def on_exception(self, state: State, error: BaseException) -> None:
        """Keep the reason in train.log, and say where the run can go on."""
        log, last = state.out / "train.log", state.out / "last.pt"
        if not log.is_file():
            return
        try:
            with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{now()}  ended by {type(error).__name__}: {error}\n")
        except OSError:  # a full disk is no reason to lose the sentence on the screen
            return
        if last.is_file() and not isinstance(error, Interrupted):
            state.say(f"the last checkpoint is {last}; continue with: --resume {state.out}")


def _write(file: Path, about: dict[str, Any]) -> None:
    write_text(file, json.dumps(about, indent=2, default=str) + "\n")
