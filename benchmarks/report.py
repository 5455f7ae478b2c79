"""Rows of the results, their table, and the file each script leaves for `benchmarks.run`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.timing import Spread
from yoloxkd.engine.atomic import write_text

FOLDER = Path(os.environ.get("YOLOXKD_BENCH_OUT", Path(__file__).parent / ".rows"))
COLUMNS = ("what", "measured", "CPU time", "goal", "met", "note")


@dataclass
class Row:
    """A claim and what was measured.

    value     median and quartiles by wall time (or whatever `what` says); cpu: the same by CPU time
    at_least, at_most  the goal, if there is one; judged by the median of `value`
    note      times, and what bounds the number
    """

    what: str
    value: Spread
    cpu: Spread | None = None
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"
    note: str = ""
    met: bool | None = field(init=False)

    def __post_init__(self) -> None:
        low = self.at_least is None or self.value.median >= self.at_least
        high = self.at_most is None or self.value.median <= self.at_most
        self.met = None if self.at_least is None and self.at_most is None else low and high

    def cells(self) -> tuple[str, ...]:
        goal = "" if self.at_least is None else f"≥ {self.at_least:g}"
        goal = goal if self.at_most is None else f"≤ {self.at_most:g}"
        met = {None: "", True: "yes", False: "no"}[self.met]
        cpu = "" if self.cpu is None else str(self.cpu)
        return (self.what, f"{self.value} {self.unit}".strip(), cpu, goal, met, self.note)


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table under COLUMNS."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def run_script(name: str, title: str, measure: Callable[[bool], Iterable[Row]]) -> None:
    """The main function of a script: measure(quick) -> rows, printed as they come and kept as JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=title)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds: the numbers mean nothing")
    quick = parser.parse_args().quick
    rows = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    for row in measure(quick):
        row.met = None if quick else row.met
        rows.append(row)
        print(f"{row.what}: {' | '.join(c for c in row.cells()[1:] if c)}", flush=True)
        kept = {"title": title, "quick": quick, "rows": [row.cells() for row in rows], "raw": [asdict(r) for r in rows]}
        write_text(FOLDER / f"{name}.json", json.dumps(kept, ensure_ascii=False, indent=1))  # it may be cut off
    print(f"\n{title}\n\n{table(row.cells() for row in rows)}")
