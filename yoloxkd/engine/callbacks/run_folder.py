"""The run folder at its start: resolved recipe and environment."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from yoloxkd.engine.atomic import clear_leftovers, write_text
from yoloxkd.engine.events import Callback, State
from yoloxkd.engine.provenance import Environment, now, provenance, read_environment
from yoloxkd.errors import Interrupted, UserError


class RunFolder(Callback):
    """Makes the folder when training is about to start, so that a run refused before leaves nothing behind.

    recipe_text  YAML of the resolved recipe

    `environment.json` holds what `provenance` says of the first start, and what each callback says by
    `Callback.environment`; each resume adds what `provenance` says of it to the list `resumed`.
    """

    def __init__(self, recipe_text: str) -> None:
        self.recipe_text = recipe_text
        self.about: dict[str, Any] = {}
        self.engine_keys: set[str] = set()

    def on_fit_start(self, state: State) -> None:
        file = state.out / "environment.json"
        here = provenance(state.device)
        if state.iteration and file.is_file():
            self.about = read_environment(file).model_dump()
            self.about["resumed"] = [*self.about["resumed"], here | {"epoch": state.epoch + 1}]
        else:
            self.about = here
        self.engine_keys = {*here, *Environment.model_fields, "finished"}
        about = self.about | callback_entries(state, self.engine_keys)
        clear_leftovers(state.out)
        write_text(state.out / "recipe.yaml", self.recipe_text)
        _write(file, about)
        state.say(f"run folder: {state.out}")  # the first line since the folder is there: train.log begins with it
        report = ", report.html at every drawing and at the end" if state.recipe.callbacks.get("report") else ""
        state.say(f"to watch there: results.csv, a row an epoch{report}")

    def on_fit_end(self, state: State) -> None:
        _write(
            state.out / "environment.json", self.about | callback_entries(state, self.engine_keys) | {"finished": now()}
        )

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


def callback_entries(state: State, reserved: Collection[str] = ()) -> dict[str, Any]:
    """What the callbacks add to environment.json.

    Args:
        state: Of the run.
        reserved: Keys that they may not use.

    Raises:
        UserError: Two of them, or one of them and the engine, use the same key.
    """
    entries: dict[str, Any] = {}
    for callback in state.callbacks:
        for key, value in callback.environment(state).items():
            if key in reserved or key in entries:
                raise UserError(
                    f"environment() of {type(callback).__name__} gives '{key}', which environment.json has of another; "
                    "give it another name"
                )
            entries[key] = value
    return entries


def _write(file: Path, about: dict[str, Any]) -> None:
    write_text(file, json.dumps(about, indent=2, default=str) + "\n")
