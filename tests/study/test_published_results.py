"""What README and docs/results.md print is what the study's own tables say, and those are what its runs measured."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
FIGURE = re.compile(r"\d+\.\d ± \d+\.\d|[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]")
STUDIES = sorted((ROOT / "cfg" / "studies").glob("*.yaml"))
PAGES = ("README.md", "docs/results.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_mean_and_interval_of_a_page_is_in_the_studys_tables(page: str) -> None:
    printed = FIGURE.findall((ROOT / page).read_text(encoding="utf-8"))
    measured = set(FIGURE.findall((RESULTS / "bccd.md").read_text(encoding="utf-8")))
    assert printed
    assert sorted(set(printed) - measured) == []


@pytest.mark.parametrize("page", PAGES)
def test_pairs_mean_and_gain_of_a_pages_row_are_of_one_row_of_the_studys_tables(page: str) -> None:
    measured = [line for line in (RESULTS / "bccd.md").read_text(encoding="utf-8").splitlines() if "](bccd/" in line]
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    printed = [line for line in lines if "±" in line]
    assert printed
    for line in printed:
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        runs = next(int(cell) for cell in cells if cell.isdigit())
        mean, *gains = FIGURE.findall(line)
        same = [row for row in measured if row.count("](bccd/") == runs and f"| {mean} |" in row]
        assert any(not gains or gains[0] in row for row in same), line


def test_every_row_of_the_summary_is_its_runs_measurement() -> None:
    with (RESULTS / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {path.parent for path in RESULTS.rglob("run.json")}
    assert len(rows) == len(runs)
    reported = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")).get("report", "test") for path in STUDIES}
    for row in rows:
        study = RESULTS / row["study"]
        is_teacher = row["student"] == "teacher"
        folder = study / "teacher" if is_teacher else study / row["student"] / f"{row['method']}-s{row['seed']}"
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert (run["study"], run["split"]) == (row["study"], reported[row["study"]])
        assert float(row["AP"]) == pytest.approx(run["metrics"]["AP"], abs=1e-4), folder
        assert float(row["AP50"]) == pytest.approx(run["metrics"]["AP50"], abs=1e-4), folder
        assert (folder / "results.csv").is_file()
