"""Commands of a study that finish at once: a training leaves the files of a finished run, a measurement those numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from yoloxkd.assembly.models import new_detector
from yoloxkd.assembly.recipes import check
from yoloxkd.config.load import read_yaml
from yoloxkd.config.recipe import Recipe
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.fingerprint import fingerprint
from yoloxkd.engine.checkpoint import file_digest, save_checkpoint
from yoloxkd.study.definition import read_study
from yoloxkd.study.plan import plan
from yoloxkd.study.processes import Cost
from yoloxkd.study.runner import Runner

NAMES = ["red", "blue"]
METRICS = {"AP": 0.5, "AP50": 0.6, "AP75": 0.4, "APs": 0.1, "APm": 0.3, "APl": 0.2}


def checkpoint(path: Path, recipe: Recipe, *, seed: int = 0, data: dict[str, Any] | None = None) -> None:
    """A best.pt of a recipe's student with the random weights of a seed."""
    torch.manual_seed(seed)
    detector = new_detector(recipe.student, NAMES)
    section = {"name": recipe.student.name} | detector.cfg.model_dump(by_alias=True) | {"family": detector.family}
    header = {"kind": "student", "version": "0", "student": section, "names": NAMES, "imgsz": 64, "data": data or {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(header | {"recipe": {}, "model": detector.state_dict(), "metrics": {}, "epoch": 1}, path)


def begin(folder: Path, recipe: Recipe) -> None:
    """What a run's folder has as soon as its training is under way, but for last.pt."""
    teachers = [{"source": name, "digest": file_digest(Path(name))} for name in recipe.teacher.models]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(by_alias=True, mode="json")))
    (folder / "environment.json").write_text(json.dumps({"kd": {"teachers": teachers}} if teachers else {}))


def finish(folder: Path, recipe: Recipe) -> None:
    """What a finished run's folder has; the weights are of its seed."""
    begin(folder, recipe)
    spec = find_data(recipe.data)
    data = {split: fingerprint(load_split(spec, split)) for split in ("train", recipe.val.split)}
    checkpoint(folder / "best.pt", recipe, seed=recipe.train.seed, data=data)
    (folder / "results.csv").write_text("epoch,images_per_s\n1,10\n")
    (folder / "metrics.json").write_text(json.dumps(METRICS | {"epoch": 1, "split": recipe.val.split}))


class Commands:
    """In place of `Processes.run`: what was trained and what was measured, as folders' names and splits."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.measured: list[tuple[str, str]] = []

    def __call__(self, command: Sequence[str], log: Path, descriptors: Sequence[int] = ()) -> Cost:
        words = list(command)
        if words[3] == "train":
            folder = Path(words[-1])
            recipe = folder / "recipe.yaml" if "--resume" in words else Path(words[words.index("--recipe") + 1])
            finish(folder, check(read_yaml(recipe)))
            self.trained.append(folder.name)
        else:
            file, split = Path(words[words.index("--json") + 1]), words[words.index("--split") + 1]
            numbers = METRICS | {
                "AP": 0.55 if split == "test" else 0.75,
                "model": "best.pt",
                "data": "x",
                "split": split,
            }
            file.write_text(json.dumps(numbers))
            self.measured.append((file.parent.name, split))
        return Cost(0, 1.0, 1.0)


class Study:
    """A study's file in a folder, and runners of what it says at the moment."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, definition: dict[str, Any]) -> None:
        self.folder, self.definition, self._patch = folder, definition, monkeypatch
        self.out, self.results = folder / "out", folder / "results"
        self.said: list[str] = []

    def runner(self, *, out: Path | None = None, results: Path | None = None) -> Runner:
        file = self.folder / "study.yaml"
        file.write_text(yaml.safe_dump(self.definition, sort_keys=False))
        study, out = read_study(str(file)), out or self.out
        return Runner(study, plan(study, out), out, results or self.results, say=self.said.append)

    def run(self, **places: Any) -> Commands:
        """Do what is missing, and say what that was."""
        runner, commands = self.runner(**places), Commands()
        self._patch.setattr(runner.processes, "run", commands)
        runner.run()
        return commands

    def about(self, run: str) -> dict[str, Any]:
        """A kept run.json."""
        value: dict[str, Any] = json.loads((self.results / "tiny" / run / "run.json").read_text())
        return value

    def change(self, run: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Edit a kept run.json."""
        about = self.about(run)
        change(about)
        (self.results / "tiny" / run / "run.json").write_text(json.dumps(about))
