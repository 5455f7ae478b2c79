"""The run's folder: the resolved recipe at the start, `metrics.json` at the end."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from yoloxkd.engine.events import Callback, State


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class RunFolder(Callback):
    """Makes the folder when training is about to start, so that a run refused before leaves nothing behind.

    recipe_text  YAML of the resolved recipe
    """

    def __init__(self, recipe_text: str, version: str) -> None:
        self.recipe_text, self.version = recipe_text, version

    def on_fit_start(self, state: State) -> None:
        state.out.mkdir(parents=True, exist_ok=True)
        write_text(state.out / "recipe.yaml", self.recipe_text)
        about: dict[str, Any] = {
            "yoloxkd": self.version,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": str(state.device),
            "threads": torch.get_num_threads(),
            "command": sys.argv,
        }
        about |= {key: state.extra[key] for key in ("backbone", "kd") if key in state.extra}
        write_text(state.out / "environment.json", json.dumps(about, indent=2, default=str) + "\n")

    def on_fit_end(self, state: State) -> None:
        best = state.extra.get("best_metrics", state.metrics)
        final = dict(best) | {"epoch": state.extra.get("best_epoch", state.epoch) + 1, "split": state.recipe.val.split}
        write_text(state.out / "metrics.json", json.dumps(final, indent=2) + "\n")
        if str(state.extra.get("backbone", "")).startswith("warning"):
            state.say(state.extra["backbone"])  # once more beside the result that it changes
