"""Interrupting runs, and comparing what they left."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import torch

from yoloxkd.engine.events import Callback, State


class StopAt(Callback):
    """Ends the run as Ctrl-C would (or by another signal), after a step."""

    def __init__(self, iteration: int, number: int = signal.SIGINT) -> None:
        self.iteration, self.number = iteration, number

    def on_step(self, state: State) -> None:
        if state.iteration == self.iteration:
            signal.raise_signal(self.number)


def rows(out: Path) -> list[dict[str, str]]:
    """results.csv without its only column that two equal runs differ in: the speed."""
    with open(out / "results.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader(file)]


def same_file(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same, bit for bit: weights, averages, optimizer, random states, everything."""
    return same(torch.load(a, weights_only=True), torch.load(b, weights_only=True))


def same(a: Any, b: Any) -> bool:
    """Equal containers of equal tensors and plain values."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)
