"""Statistics of a study: means over seeds, paired differences with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from yoloxkd.study.definition import Definition, Grid
from yoloxkd.study.files import METRICS
from yoloxkd.study.kept_runs import Record
from yoloxkd.study.plan import Key

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Of n values: their mean, standard deviation (n - 1 in the denominator; NaN below two), half of the 95 % interval.

    The interval is of the mean, by Student's t with n - 1 degrees of freedom; NaN below two.
    """

    n: int
    mean: float
    deviation: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def sure(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    @property
    def p_value(self) -> float:
        """Of a two-sided t test against a mean of zero (for paired differences: the paired t test); NaN below two values."""
        from scipy.special import stdtr

        if self.n < 2 or self.deviation == 0:
            return math.nan if self.n < 2 else float(self.mean == 0)
        return float(2 * stdtr(self.n - 1, -abs(self.mean) * math.sqrt(self.n) / self.deviation))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted by Holm's step-down method (Holm 1979): at most a share a of families has a false one below a.

    Each, in rising order, times the number of values from it on, at least the one before it, at most 1. Must not be NaN.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def spread(values: Sequence[float]) -> Spread:
    """Mean, deviation and interval of a sample; all NaN without values."""
    n = len(values)
    if n == 0:
        return Spread(0, math.nan, math.nan, math.nan)
    mean = math.fsum(values) / n
    if n == 1:
        return Spread(1, mean, math.nan, math.nan)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Spread(n, mean, deviation, student_t(n - 1) * deviation / math.sqrt(n))


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The two-sided quantile of Student's t: a mean is within this many standard errors with that confidence."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + confidence) / 2))


@dataclass(frozen=True)
class Row:
    """One student with one method: its finished runs and what they amount to.

    planned     how many seeds the grid has
    metrics     spread over the finished seeds, 0 to 1
    gains       paired differences to the baseline, over the seeds that both have; empty for the baseline itself
    """

    student: str
    method: str
    planned: int
    records: list[Record]
    metrics: Mapping[str, Spread]
    gains: Mapping[str, Spread]

    @property
    def epochs(self) -> int | None:
        return self.records[0].epochs if self.records else None

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """By error type: what it costs in AP50 (0 to 1) and the number of errors, means over the seeds that know them."""
        error_records = [record.errors for record in self.records if record.errors]
        return {
            kind: (
                spread([e[kind]["AP50"] for e in error_records]).mean,
                spread([e[kind]["count"] for e in error_records]).mean,
            )
            for kind in (error_records[0] if error_records else ())
        }

    @property
    def step_seconds(self) -> float:
        return spread([r.step_seconds for r in self.records if r.step_seconds is not None]).mean

    @property
    def seconds(self) -> float:
        return spread([r.seconds for r in self.records if r.seconds > 0]).mean

    @property
    def cpu_seconds(self) -> float:
        return spread([r.cpu_seconds for r in self.records if r.cpu_seconds is not None]).mean


def rows(study: Definition, grid: Grid, records: Mapping[Key, Record]) -> list[Row]:
    """A row for every student and method of a grid, in the study's order; a metric of -1 is no value."""
    out, base = [], grid.baseline or study.baseline
    for student in grid.students or study.students:
        for method in grid.methods or study.methods:
            keys = [Key(student, method, seed) for seed in grid.seeds or study.seeds]
            finished = [records[key] for key in keys if key in records]
            metrics = {name: spread([r.metrics[name] for r in finished if r.metrics[name] >= 0]) for name in METRICS}
            gains = {} if method == base else _gains(base, finished, records)
            out.append(Row(student, method, len(keys), finished, metrics, gains))
    return out


def _gains(baseline: str, finished: Sequence[Record], records: Mapping[Key, Record]) -> dict[str, Spread]:
    """By metric: the differences between these runs and the baseline's of the same student and seed."""
    base = {r.key: records.get(Key(r.key.student, baseline, r.key.seed)) for r in finished}
    out = {}
    for name in METRICS:
        pairs = [(r.metrics[name], b.metrics[name]) for r in finished if (b := base[r.key]) is not None]
        out[name] = spread([a - b for a, b in pairs if a >= 0 and b >= 0])
    return out
