"""The tests that docs/protocol.md names, over several studies: paired gains, p values, and p values adjusted by Holm's method.

    python scripts/second_round.py [--results docs/results]

Writes second-round.md into the results' folder, from the run.json files that `yoloxkd study` keeps there. A test whose pairs are not
all there counts as p = 1 among the others, so that an adjusted p can only fall while runs are added.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yoloxkd.engine.atomic import write_text
from yoloxkd.study.kept_runs import Record, read_records
from yoloxkd.study.pages import gain_text, points_text
from yoloxkd.study.plan import Key
from yoloxkd.study.statistics import Spread, holm, spread

PAGE = "second-round.md"
LEVEL = 0.05


@dataclass(frozen=True)
class Tested:
    """A method of a study's student, compared with its baseline over these seeds."""

    study: str
    student: str
    method: str
    baseline: str
    seeds: range


def _tests(study: str, student: str, methods: Sequence[str], seeds: int, baseline: str = "none") -> list[Tested]:
    return [Tested(study, student, method, baseline, range(seeds)) for method in methods]


BCCD = ("fgd", "pgd-yolox", "response", "pkd", "fgd+pgd-yolox")
VEHICLES = ("fgd", "pgd-yolox", "response", "fgd+pgd-yolox")
FAMILIES = {
    "Headline: over the plain student of the same epochs": [
        *_tests("bccd-headline", "yolox-nano", BCCD, 7),
        *_tests("vehicles_oi-headline", "yolox-nano", VEHICLES, 5),
        *_tests("bccd-families", "fcos-mobilenetv2", ["pkd-auto"], 5),
    ],
    "Equal time: over the plain student trained for 38 epochs": _tests(
        "bccd-headline", "yolox-nano", BCCD, 7, "longer"
    ),
}


def page(results: Path) -> str:
    """The page: a table a family of tests. AP in points, on the reported split."""
    records = {test.study: read_records(results, test.study) for tests in FAMILIES.values() for test in tests}
    lines = ["# Tests of the second round", ""]
    lines += [
        "The tests that the [protocol](../protocol.md) names. A gain is the mean of the paired differences in AP on test, with its 95 % "
        "interval by Student's t; p is of the paired t test, and *adjusted* is by Holm's method among the tests of the table. "
        f"A row **helps** when its gain is above zero and its adjusted p is below {LEVEL:g}. A test whose pairs are not all there counts as p = 1.",
        "",
    ]
    for title, tests in FAMILIES.items():
        lines += [f"## {title}", "", *table(tests, records), ""]
    lines.append("`python scripts/second_round.py` writes this page from the runs kept beside it.")
    return "\n".join(lines) + "\n"


def table(tests: Sequence[Tested], records: Mapping[str, Mapping[Key, Record]]) -> list[str]:
    """Lines of a family's table."""
    gains = [paired(test, records[test.study]) for test in tests]
    complete = [gain.n == len(test.seeds) for test, gain in zip(tests, gains, strict=True)]
    adjusted = holm([gain.p_value if done else 1.0 for gain, done in zip(gains, complete, strict=True)])
    lines = [
        "| study | student | method | pairs | AP | gain | p | adjusted | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for test, gain, done, value in zip(tests, gains, complete, adjusted, strict=True):
        pairs = str(gain.n) if done else f"{gain.n} of {len(test.seeds)}"
        p = f"{gain.p_value:.2g}" if done else "–"
        verdict = "unfinished" if not done else "**helps**" if value < LEVEL and gain.mean > 0 else ""
        ap = points_text(_of(test, records[test.study]))
        shown = gain_text(gain) if done else gain_text(gain).strip("*")  # bold is for what the protocol planned
        cells = [test.study, test.student, f"`{test.method}`", pairs, ap, shown, p]
        lines.append("| " + " | ".join([*cells, f"{value:.2g}" if done else "–", verdict]) + " |")
    return lines


def paired(test: Tested, records: Mapping[Key, Record]) -> Spread:
    """Differences in AP, 0 to 1, over the seeds that both rows have."""
    differences = []
    for seed in test.seeds:
        run, base = (records.get(Key(test.student, method, seed)) for method in (test.method, test.baseline))
        if run is not None and base is not None:
            differences.append(run.metrics["AP"] - base.metrics["AP"])
    return spread(differences)


def _of(test: Tested, records: Mapping[Key, Record]) -> Spread:
    keys = [Key(test.student, test.method, seed) for seed in test.seeds]
    return spread([records[key].metrics["AP"] for key in keys if key in records])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "results")
    folder = parser.parse_args().results
    write_text(folder / PAGE, page(folder))
    print(folder / PAGE)
