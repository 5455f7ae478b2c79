"""Every benchmark runs, in its quick form; both sides of each are checked for equal results inside."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.peak_memory import high_water
from benchmarks.peers import PEERS, installed
from benchmarks.report import Row
from benchmarks.run import SCRIPTS
from benchmarks.scenes import batch_of, detector
from benchmarks.steps import turn
from benchmarks.timing import Samples, Spread, alternate, ratio
from tests.conftest import REPOSITORY

ALONE = (
    "kd_losses",
    "dense_losses",
    "kd_baselines",
    "kd_methods",
    "steps",
    "start",
    "growth",
    "two_stage",
    "memory_format",
    "heap",
)
LONG = ("kd_baselines", "kd_losses", "kd_methods", "dense_losses", "two_stage", "heap", "memory_format")
BESIDE_PEERS = ("simota", "train_step", "coco_eval")
NEEDS_BCCD = ("data",)
OF_A_GPU = ("loading",)
"""Not among the kept results: `make bench-gpu` has their rows."""


def rows(name: str) -> list[Row]:
    return list(import_module(f"benchmarks.{name}").measure(quick=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in (*ALONE, *OF_A_GPU)]
)
def test_it_runs(name: str) -> None:
    found = rows(name)
    assert found
    assert all(row.value.low <= row.value.median <= row.value.high for row in found)


@pytest.mark.parametrize("name", [*BESIDE_PEERS, *NEEDS_BCCD])
def test_it_runs_beside_its_peer(name: str, request: pytest.FixtureRequest) -> None:
    if name in NEEDS_BCCD:
        request.getfixturevalue("bccd")
    wanted = {package: version for package, version in PEERS.items() if version}
    if not wanted.items() <= installed().items():
        pytest.skip("the peers are installed by the benchmarks themselves, which needs the network: make bench")
    assert all(row.value.median > 0 for row in rows(name))


def test_the_performance_page_has_the_kept_results() -> None:
    page = (REPOSITORY / "docs" / "performance.md").read_text("utf-8").partition("\n## ")[0]
    kept = (REPOSITORY / "benchmarks" / "results.md").read_text("utf-8")
    values = [float(v) for v in re.findall(r"^\| [^|]+ \| ([\d.]+) ", kept, re.M)]
    measured = [
        row.split(" | ")[1] for row in page.splitlines() if row.startswith("| ") and "not in that file" not in row
    ]
    numbers = [number for cell in measured for number in re.findall(r"\d+(?:\.\d+)?", cell)]
    assert len(numbers) > 20
    for number in numbers:
        assert any(f"{value:.{len(number.partition('.')[2])}f}" == number for value in values), number


def test_a_part_measured_again_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "benchmarks" / "results.md").read_text("utf-8")
    file = tmp_path / "results.md"
    file.write_text(text, "utf-8")
    (tmp_path / "simota.json").write_text(
        json.dumps({"quick": False, "title": "New", "rows": [["x", "1", "1", "", "", ""]]})
    )
    monkeypatch.setattr(run, "RESULTS", file)
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    run.write_results(["simota"])
    old, new = run.sections(text), run.sections(file.read_text("utf-8"))
    assert {name for name in SCRIPTS if old.get(name) != new.get(name)} == {"simota"}
    assert new["simota"].startswith("## New (`python -m benchmarks.simota`)\n\nMeasured ")


def test_every_script_is_run() -> None:
    assert {*ALONE, *BESIDE_PEERS, *NEEDS_BCCD} <= set(SCRIPTS)
    assert all(callable(import_module(f"benchmarks.{name}").measure) for name in SCRIPTS)


@pytest.mark.slow
def test_ratios_are_of_neighbors_and_orders_alternate() -> None:
    order: list[str] = []
    samples = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4)
    assert "".join(order) == "abbaabbaab"
    assert len(samples["a"].wall) == 4
    wall, _ = ratio(Samples([2.0, 20.0, 6.0], [1.0] * 3), Samples([1.0, 10.0, 2.0], [1.0] * 3))
    assert (wall.median, wall.low, wall.high) == (2.0, 2.0, 2.5)


def test_a_goal_is_judged_by_the_median() -> None:
    assert Row("x", Spread(10, 1, 20), at_least=10).met
    assert not Row("x", Spread(9.9, 1, 20), at_least=10).met
    assert Row("x", Spread(1, 1, 1), at_most=1.1).met
    assert Row("x", Spread(1, 1, 1)).met is None


def test_a_distilled_step_holds_little_more_than_the_student_and_what_is_tapped() -> None:
    """The teacher's own intermediate maps are gone before the student's are there."""
    images, size = 2, 128
    batch = batch_of(images, 4, size)
    peaks = {}
    for mode in ("step", "fgd", "pgd"):
        step = turn(mode, "yolox-nano", "yolox-tiny", batch)
        step()
        peaks[mode] = high_water(step)
    teacher = detector("yolox-tiny", 1).eval()
    out = teacher(batch.images)
    tap = sum(m.nbytes for m in out.features) / 2**20
    assert peaks["fgd"] - peaks["step"] < 4 * tap
    assert peaks["pgd"] - peaks["step"] < 12 * tap
