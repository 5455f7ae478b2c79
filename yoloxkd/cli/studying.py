"""`yoloxkd study`: plan, run what is missing, keep the results, print the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from yoloxkd.cli.tables import table
from yoloxkd.errors import UserError, nearest
from yoloxkd.file_kinds import check_not_exported
from yoloxkd.study.definition import Definition, TeacherPart, read_study
from yoloxkd.study.files import METRICS
from yoloxkd.study.kept_runs import Record
from yoloxkd.study.pages import check_report_paths, gain_text, points_text, write_report
from yoloxkd.study.plan import Key, plan
from yoloxkd.study.runner import Runner
from yoloxkd.study.statistics import Row, rows

RUNS = Path("runs/study")


def run_study(
    name: str,
    *,
    out: Path | None,
    results: Path | None,
    jobs: int,
    grids: Sequence[str],
    data: str | None,
    teacher: str | None,
    device: str | None,
    workers: int | None,
    dry_run: bool,
    collect: bool,
) -> None:
    """Do what is missing of a study (or of some grids); its tables are rewritten after every run, so they hold what is done so far."""
    study = read_study(name)
    check_grids(study, grids)
    if teacher is not None:
        study.teacher = TeacherPart(file=teacher, train=None)
    if study.teacher is not None and study.teacher.file is not None:
        check_not_exported(study.teacher.file)
    out = out or RUNS / study.name
    results = results or out / "results"
    check_report_paths(study, out, results, [name, *([] if data is None else [data])])
    local = {"data": data, "device": device, "workers": workers}
    runs = plan(study, out, {key: value for key, value in local.items() if value is not None})
    runner = Runner(
        study,
        runs,
        out,
        results,
        grids=grids or None,
        jobs=jobs,
        say=_say,
        on_record=lambda records: write_report(study, records, results),
    )
    if dry_run:
        runner.check_data(if_here=True)
        todo = {run.key for run in runner.missing()}
        for key in runs:
            print(f"{'to do' if key in todo else 'done ' if key in runner.records else 'left '} {key.path}")
        return
    try:
        if collect:
            runner.collect()
        else:
            runner.run()
    finally:
        if runner.records:
            print(tables(study, runner.records))
            print("written: " + ", ".join(str(path) for path in write_report(study, runner.records, results)))


def check_grids(study: Definition, grids: Sequence[str]) -> None:
    for grid in grids:
        if grid not in study.parts():
            raise UserError(f"study {study.name} has no grid '{grid}'; {nearest(grid, study.parts())}")


def tables(study: Definition, records: Mapping[Key, Record]) -> str:
    """A table for each grid and student that has results, for the screen: AP in points, the page has the deviations."""
    head = ["method", "seeds", "AP", "gain [95 %]", *METRICS[1:], "step ms", "CPU s"]
    texts = []
    for title, grid in study.parts().items():
        grid_rows = rows(study, grid, records)
        for student in dict.fromkeys(row.student for row in grid_rows if row.records):
            lines = [_cells(row) for row in grid_rows if row.student == student]
            texts.append(f"{grid.title or title}: {student}\n" + table(head, lines))
    return "\n\n".join(texts)


def _cells(row: Row) -> list[str]:
    cells = [row.method, f"{len(row.records)}/{row.planned}", points_text(row.metrics["AP"])]
    cells.append(gain_text(row.gains["AP"]).strip("*") if row.gains else "")
    cells += [_number(100 * row.metrics[name].mean, 1) for name in METRICS[1:]]
    return [*cells, _number(1000 * row.step_seconds, 0), _number(row.cpu_seconds, 0)]


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _say(text: str) -> None:
    print(text, flush=True)
