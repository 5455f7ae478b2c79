"""Means, deviations, intervals and pairing, against numbers worked out by hand and by scipy's own test."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import write
from yoloxkd.study import pages as report
from yoloxkd.study.definition import Definition, Grid, read_study
from yoloxkd.study.files import METRICS
from yoloxkd.study.kept_runs import Record
from yoloxkd.study.pages import gain_text, markdown, points_text, statistics_csv
from yoloxkd.study.plan import Key, keys
from yoloxkd.study.statistics import holm, rows, spread, student_t
from yoloxkd.viz.comparison import Comparison


def record(method: str, seed: int, ap: float, **more: Any) -> Record:
    metrics = dict.fromkeys(METRICS, ap) | {"APs": -1.0}
    return Record(Key("nano", method, seed), 1, metrics, 10.0, link=f"tiny/nano/{method}-s{seed}", **more)


@pytest.fixture
def study(tiny: dict[str, Any], tmp_path: Path) -> Definition:
    return read_study(write(tmp_path, tiny | {"seeds": [0, 1, 2]}))


def test_quantiles_of_student_s_t() -> None:
    """Against the printed table: 1, 4 and 30 degrees of freedom, two-sided 95 %."""
    assert [round(student_t(n), 3) for n in (1, 4, 30)] == [12.706, 2.776, 2.042]


def test_spread_of_few_values() -> None:
    nothing, one, three = spread([]), spread([2.0]), spread([1.0, 2.0, 6.0])
    assert nothing.n == 0
    assert math.isnan(nothing.mean)
    assert one.mean == 2.0
    assert math.isnan(one.deviation)
    assert not one.sure
    assert three.mean == 3.0
    assert three.deviation == pytest.approx(math.sqrt(7.0))
    assert three.half == pytest.approx(4.30265 * math.sqrt(7.0 / 3), rel=1e-5)


def test_the_interval_is_that_of_the_paired_t_test(study: Definition) -> None:
    from scipy.stats import ttest_rel

    plain, taught = [0.30, 0.35, 0.28], [0.36, 0.40, 0.37]
    records = {r.key: r for s in range(3) for r in (record("none", s, plain[s]), record("pgd", s, taught[s]))}
    base, pgd = rows(study, Grid(), records)
    test = ttest_rel(taught, plain)
    expected = test.confidence_interval(0.95)
    gain = pgd.gains["AP"]
    assert (gain.low, gain.high) == pytest.approx((expected.low, expected.high))
    assert gain.p_value == pytest.approx(test.pvalue)
    assert gain.sure
    assert base.gains == {}
    assert pgd.metrics["APs"].n == 0  # -1 is no value
    assert gain_text(gain).startswith("**+6.7 [+")
    assert points_text(base.metrics["AP"]) == "31.0 ± 3.6"


def test_p_values_of_samples_without_spread() -> None:
    assert math.isnan(spread([0.1]).p_value)
    assert (spread([0.5, 0.5]).p_value, spread([0.0, 0.0]).p_value) == (0.0, 1.0)


def test_holm_adjusts_in_rising_order() -> None:
    """By hand: 3 * 0.01; 2 * 0.02 = 0.04; 1 * 0.03 is raised to 0.04, the one before it."""
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_the_page_adjusts_its_tests_for_their_number(study: Definition) -> None:
    methods = ("none", "pgd", "fgd")
    found = [record(m, s, 0.3 + 0.1 * (m != "none") * (1 + 0.1 * s)) for s in range(3) for m in methods]
    base, pgd = rows(study, Grid(), {r.key: r for r in found})
    assert "Holm" not in markdown(study, {"all": [base, pgd]}, {}, None)  # one test needs no adjustment
    page = markdown(study, {"all": [base, pgd, replace(pgd, method="pgd")]}, {}, None)
    p_value = pgd.gains["AP"].p_value
    assert f"for 2 rows: `pgd` {p_value:.2g} ({2 * p_value:.2g})" in page


def test_only_seeds_that_both_have_are_paired(study: Definition) -> None:
    finished = [record("none", 0, 0.3), record("pgd", 0, 0.4), record("pgd", 1, 0.9)]
    _, pgd = rows(study, Grid(), {r.key: r for r in finished})
    assert pgd.gains["AP"].n == 1
    assert pgd.gains["AP"].mean == pytest.approx(0.1)
    assert pgd.metrics["AP"].n == 2
    assert gain_text(pgd.gains["AP"]) == "+10.0 (one pair)"


def test_the_page_links_every_row_to_its_runs_and_says_what_is_missing(study: Definition) -> None:
    found = [record("none", 0, 0.3, cpu_seconds=7.0, step_seconds=0.5), record("none", 1, 0.4), record("pgd", 0, 0.4)]
    records = {r.key: r for r in found}
    tables = {"all": rows(study, Grid(), records)}
    page = markdown(study, tables, records, None)
    assert "Unfinished: 3 of 6 runs are done." in page
    assert "[0](tiny/nano/none-s0/) [1](tiny/nano/none-s1/) (2 of 3)" in page
    assert "| 500 | 7 | 10 |" in page
    table = statistics_csv(study, tables).splitlines()
    assert len(table) == 3
    assert table[1].endswith("tiny/nano/none-s0 tiny/nano/none-s1")
    assert len({len(line.split(",")) for line in table}) == 1


def test_error_types_have_a_table_of_their_own(study: Definition) -> None:
    def errors(cost: float, count: int) -> dict[str, dict[str, float]]:
        return {"localization": {"AP50": cost, "count": count}, "missed": {"AP50": 0.1, "count": 4}}

    found = [record("none", 0, 0.3, errors=errors(0.2, 7)), record("none", 1, 0.4, errors=errors(0.1, 8))]
    tables = {"all": rows(study, Grid(), {r.key: r for r in [*found, record("pgd", 0, 0.4)]})}
    page = markdown(study, tables, {}, None)
    assert "| method | localization | missed |" in page
    assert "| `none` | 15.0 (8) | 10.0 (4) |" in page
    assert "| `pgd` | 15.0" not in page  # of a run that was measured before there were any
    assert "Error types" not in markdown(study, {"all": rows(study, Grid(), {})}, {}, None)


def test_a_grid_with_its_own_baseline_is_compared_with_that(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"none": None, "pgd": {"kd": "pgd"}, "more": {"kd": ["pgd", "fgd"]}}
    grids = {"all": {"seeds": [0, 1]}, "adds": {"methods": ["more", "pgd"], "seeds": [0, 1], "baseline": "pgd"}}
    study = read_study(write(tmp_path, tiny | {"methods": methods, "grids": grids}))
    aps = {"none": (0.3, 0.2), "pgd": (0.4, 0.4), "more": (0.5, 0.45)}
    records = {r.key: r for name, pair in aps.items() for r in (record(name, s, ap) for s, ap in enumerate(pair))}
    tables = {title: rows(study, grid, records) for title, grid in study.parts().items()}
    more, pgd = tables["adds"]
    assert pgd.gains == {}
    assert more.gains["AP"].mean == pytest.approx(0.075)
    assert [row.gains["AP"].mean for row in tables["all"][1:]] == pytest.approx([0.15, 0.225])
    page = markdown(study, tables, records, None)
    assert page.count("Gains in this table are differences to `pgd`.") == 1
    assert [key.method for key in keys(study, ["adds"])] == ["pgd", "more"] * 2  # whole pairs, should it be interrupted
    drawn: list[Comparison] = []
    monkeypatch.setattr(report, "draw_comparison", lambda shown, *_: drawn.extend(shown))
    report.write_report(study, records, tmp_path)
    assert [(shown.title, shown.baseline) for shown in drawn] == [
        ("all: nano", "the plain student"),
        ("adds: nano", "pgd"),
    ]
    drawn.clear()
    report.write_report(study, {k: r for k, r in records.items() if k.method != "pgd"}, tmp_path)
    assert [shown.title for shown in drawn] == ["all: nano"]  # no pair yet over the other baseline
