"""Where the weights of the student come from that a run begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yoloxkd.engine.checkpoint_parts import SavedPart, checked_state
from yoloxkd.engine.events import Callback, State
from yoloxkd.viz.html_report import LossHistory, ReportPart


class SavedFirstWeights(SavedPart):
    """As `FirstWeights.state_dict`."""

    note: str


class FirstWeights(Callback):
    """Keeps the note on the backbone's first weights with the run, and repeats a warning beside the result that it changes.

    Args:
        note: What was said of them; empty where they are those of a checkpoint.
    """

    name = "backbone"

    def __init__(self, note: str = "") -> None:
        self.note = note

    @property
    def warning(self) -> str:
        return self.note if self.note.startswith("warning") else ""

    def on_fit_end(self, state: State) -> None:
        if self.warning:
            state.say(self.warning)

    def state_dict(self) -> dict[str, Any]:
        return {"note": self.note} if self.note else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.note = checked_state(SavedFirstWeights, saved, self.name).note

    def environment(self, state: State) -> dict[str, Any]:
        return {"backbone": self.note} if self.note else {}

    def report(self, state: State, history: LossHistory) -> ReportPart:
        return ReportPart(notes=[self.warning] if self.warning else [])
