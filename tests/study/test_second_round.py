"""The tests over several studies: which pairs count, Holm's method among all of a family, and the page that is published."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from scipy.stats import ttest_rel

from yoloxkd.study.definition import read_study
from yoloxkd.study.kept_runs import Record
from yoloxkd.study.plan import Key
from yoloxkd.study.statistics import holm

ROOT = Path(__file__).parents[2]
NONE = [0.40, 0.42, 0.44]
BETTER, WORSE, SAME = [0.45, 0.472, 0.489], [0.35, 0.368, 0.391], [0.41, 0.40, 0.445]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("second_round", ROOT / "scripts" / "second_round.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "second_round", module)
    spec.loader.exec_module(module)
    return module


def _records(values: Mapping[str, list[float]]) -> dict[Key, Record]:
    return {
        (key := Key("nano", method, seed)): Record(key, 1, {"AP": value}, 1.0)
        for method, aps in values.items()
        for seed, value in enumerate(aps)
    }


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_family_has_paired_t_tests_adjusted_by_holm(script: ModuleType) -> None:
    tests = script._tests("s", "nano", ["better", "worse", "same"], 3)
    records = {"s": _records({"none": NONE, "better": BETTER, "worse": WORSE, "same": SAME})}
    rows = [_cells(line) for line in script.table(tests, records)[2:]]
    p_values = [float(ttest_rel(values, NONE).pvalue) for values in (BETTER, WORSE, SAME)]
    assert [row[6] for row in rows] == [f"{p:.2g}" for p in p_values]
    assert [row[7] for row in rows] == [f"{p:.2g}" for p in holm(p_values)]
    assert [row[8] for row in rows] == ["**helps**", "", ""]
    assert rows[0][3] == "3"
    assert rows[0][5].startswith("**+5.0 [")


def test_an_unfinished_test_counts_as_one_and_shows_no_p_value(script: ModuleType) -> None:
    tests = script._tests("s", "nano", ["better", "same"], 3)
    records = {"s": _records({"none": NONE, "better": BETTER, "same": SAME[:2]})}
    better, same = (_cells(line) for line in script.table(tests, records)[2:])
    assert better[7] == f"{2 * float(ttest_rel(BETTER, NONE).pvalue):.2g}"
    assert same[3] == "2 of 3"
    assert same[6:] == ["–", "–", "unfinished"]
    assert not same[5].startswith("*")


def test_the_tests_are_those_that_the_studies_plan(script: ModuleType) -> None:
    headline, equal_time = script.FAMILIES.values()
    assert (len(headline), len(equal_time)) == (10, 5)
    for test in [*headline, *equal_time]:
        study = read_study(test.study)
        assert list(test.seeds) == study.seeds
        assert any(
            test.student in (grid.students or study.students)
            and {test.method, test.baseline} <= set(grid.methods or study.methods)
            for grid in study.parts().values()
        ), test


def test_the_published_page_is_what_the_kept_runs_say(script: ModuleType) -> None:
    results = ROOT / "docs" / "results"
    assert (results / script.PAGE).read_text(encoding="utf-8") == script.page(results)
