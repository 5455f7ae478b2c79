"""Measuring on a machine that others use too: short turns, taken alternately, and ratios of neighboring turns.

A ratio of two neighboring turns holds when the machine's speed drifts, and the median of many holds when a few turns
are disturbed. CPU time (all threads) stands beside wall time, because waiting for a busy core costs none of it.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Turn = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a number."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass
class Samples:
    """Seconds of each turn of one side."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)

    @property
    def milliseconds(self) -> str:
        return f"{self.seconds * 1e3:.3g} ms"


def with_children() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def alternate(
    turns: dict[str, Turn], rounds: int, warmup: int = 1, cpu_clock: Callable[[], float] = time.process_time
) -> dict[str, Samples]:
    """Run every turn once a round, in an order that is reversed each round, after `warmup` rounds not counted."""
    samples = {name: Samples() for name in turns}
    for number in range(-warmup, rounds):
        gc.collect()
        for name in list(turns) if number % 2 else list(reversed(turns)):
            gc.disable()
            wall, cpu = time.perf_counter(), cpu_clock()
            turns[name]()
            wall, cpu = time.perf_counter() - wall, cpu_clock() - cpu
            gc.enable()
            if number >= 0:
                samples[name].wall.append(wall)
                samples[name].cpu.append(cpu)
    return samples


def ratio(over: Samples, under: Samples) -> tuple[Spread, Spread]:
    """Wall and CPU time of one side over the other's, turn by turn."""
    pairs = [(over.wall, under.wall), (over.cpu, under.cpu)]
    wall, cpu = (Spread.of([a / max(b, 1e-9) for a, b in zip(*pair, strict=True)]) for pair in pairs)
    return wall, cpu


def ratio_to_sum(over: Samples, parts: list[Samples]) -> tuple[Spread, Spread]:
    """The same, over the sum of several sides."""
    total = Samples(*([sum(v) for v in zip(*(getattr(p, k) for p in parts), strict=True)] for k in ("wall", "cpu")))
    return ratio(over, total)
