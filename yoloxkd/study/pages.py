"""Pages of a study: a Markdown table, a CSV of the statistics, a plot with error bars."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from yoloxkd.engine.atomic import write_text
from yoloxkd.metrics.coco import COUNTED_FROM
from yoloxkd.output_paths import Output, check_folder, check_outputs, head
from yoloxkd.study.definition import Definition, Grid
from yoloxkd.study.files import METRICS
from yoloxkd.study.kept_runs import Record, write_summary
from yoloxkd.study.plan import TEACHER, Key
from yoloxkd.study.statistics import Row, Spread, holm, rows
from yoloxkd.viz.comparison import Comparison, draw_comparison

SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")
NOTHING = "–"


def check_report_paths(study: Definition, out: Path, results: Path, inputs: Sequence[str | Path]) -> None:
    """UserError: a table of the study would replace a file that is not its own, or a folder cannot be written to."""
    page, table, plot = (results / f"{study.name}{suffix}" for suffix in (".md", ".csv", ".png"))
    check_outputs(
        [
            Output("--results", page, lambda file: head(file).startswith(f"# Study {study.name}".encode())),
            Output("--results", table, lambda file: head(file).startswith(b"grid,student,method,")),
            Output("--results", plot, lambda _: page.is_file()),
            Output("--results", results / "summary.csv", lambda file: head(file).startswith(b"study,student,method,")),
        ],
        inputs,
    )
    check_folder(out)


def write_report(study: Definition, records: Mapping[Key, Record], results: Path) -> list[Path]:
    """Write summary.csv (a row a run), NAME.csv (a row a student and method), NAME.md and NAME.png; their paths."""
    tables = {title: rows(study, grid, records) for title, grid in study.parts().items()}
    page, table, plot = (results / f"{study.name}{suffix}" for suffix in (".md", ".csv", ".png"))
    summary = write_summary(results, study.name, records)
    write_text(table, statistics_csv(study, tables))
    written = [summary, table]
    comparisons = _comparisons(study, tables)
    if comparisons:
        draw_comparison(comparisons, plot, f"AP on the {study.report} split")
        written.append(plot)
    write_text(page, markdown(study, tables, records, plot.name if comparisons else None))
    return [page, *written]


def markdown(
    study: Definition, tables: Mapping[str, Sequence[Row]], records: Mapping[Key, Record], plot: str | None
) -> str:
    """The page. AP in points (hundredths); every number's runs are linked in its row."""
    lines = [f"# Study {study.name}", ""]
    lines += [
        f"Data `{study.data}`, {study.epochs} epochs where a row says nothing else. The best epoch of each run was chosen on "
        f"`{study.choose}`; all numbers are of that student on `{study.report}`, in AP points (hundredths): mean ± standard "
        "deviation over the seeds. Gains are differences to "
        f"`{study.baseline}` of the same student and seed (same initial weights, same sample order), with the 95 % interval "
        "of their mean by Student's t; **bold** where it excludes zero. Times are means of a run: a step is the median wall "
        "time of a training step, CPU is the processor time of the whole training with its evaluations.",
        "",
    ]
    if study.screening:
        lines += [
            f"Screening: `{study.report}` chose the epochs, so these numbers are too good, and serve to choose a setting.",
            "",
        ]
    lines += _teacher_lines(records)
    for title, grid in study.parts().items():
        lines += _grid_lines(study, title, grid, tables[title])
    if plot:
        lines += [f"![Mean AP with standard deviations, and paired gains with their intervals]({plot})", ""]
    return "\n".join(lines)


def _teacher_lines(records: Mapping[Key, Record]) -> list[str]:
    teachers = [record for key, record in records.items() if key.student == TEACHER]
    if not teachers:
        return []
    values = ", ".join(f"{name} {100 * teachers[0].metrics[name]:.1f}" for name in SHOWN)
    name = f"[Teacher]({teachers[0].link}/)" if teachers[0].link else "Teacher"
    return [f"{name}: {values}.", ""]


def _grid_lines(study: Definition, title: str, grid: Grid, table: Sequence[Row]) -> list[str]:
    heading = grid.title or title
    lines = [f"## {heading}", ""]
    unfinished = [row for row in table if len(row.records) < row.planned]
    if unfinished:
        done, planned = sum(len(r.records) for r in table), sum(r.planned for r in table)
        lines += [f"Unfinished: {done} of {planned} runs are done.", ""]
    if grid.baseline is not None:
        lines += [f"Gains in this table are differences to `{grid.baseline}`.", ""]
    for student in dict.fromkeys(row.student for row in table):
        part = [row for row in table if row.student == student]
        lines += [f"### {student}", ""]
        head = ["method", "seeds", "AP", "gain in AP", *SHOWN[1:], "gain in AP50", "step ms", "CPU s", "wall s"]
        lines += [_line(head), _line(["---"] * len(head))]
        lines += [_line(_cells(study, row)) for row in part]
        lines += ["", *_test_lines(part), *_error_lines(part)]
    return lines


def _test_lines(part: Sequence[Row]) -> list[str]:
    """The paired t tests of a table's gains in AP, adjusted for their number; nothing for a single one."""
    tested = [(row.method, row.gains["AP"].p_value) for row in part if row.gains and row.gains["AP"].n > 1]
    if len(tested) < 2:
        return []
    adjusted = holm([p_value for _, p_value in tested])
    values = ", ".join(f"`{method}` {p:.2g} ({a:.2g})" for (method, p), a in zip(tested, adjusted, strict=True))
    return [
        f"Paired t tests of the gains in AP: p, and in brackets p adjusted by Holm's method for {len(tested)} rows: {values}.",
        "",
    ]


def _error_lines(part: Sequence[Row]) -> list[str]:
    """A table of the error types of those rows that know them."""
    rows_with_errors = [row for row in part if row.errors]
    if not rows_with_errors:
        return []
    lines = [
        "Error types (TIDE): what each costs in AP50 points, and in brackets how many errors, by detections of score "
        f"{COUNTED_FROM:g} and more; means over the seeds.",
        "",
        _line(["method", *rows_with_errors[0].errors]),
        _line(["---"] * (1 + len(rows_with_errors[0].errors))),
    ]
    for row in rows_with_errors:
        lines.append(_line([f"`{row.method}`", *(f"{100 * a:.1f} ({n:.0f})" for a, n in row.errors.values())]))
    return [*lines, ""]


def _cells(study: Definition, row: Row) -> list[str]:
    method = study.methods[row.method]
    name = f"`{row.method}`"
    if row.epochs is not None and row.epochs != study.epochs:
        name += f" ({row.epochs} epochs)"
    if method.note:
        name += f" {method.note}"
    seeds = " ".join(_seed(record) for record in row.records)
    if len(row.records) < row.planned:
        seeds = f"{seeds} ({len(row.records)} of {row.planned})".strip()
    values = {metric: points_text(row.metrics[metric]) for metric in SHOWN}
    gains = [NOTHING if not row.gains else gain_text(row.gains[metric]) for metric in ("AP", "AP50")]
    times = [_number(1000 * row.step_seconds), _number(row.cpu_seconds), _number(row.seconds)]
    return [name, seeds, values["AP"], gains[0], *(values[m] for m in SHOWN[1:]), gains[1], *times]


def _seed(record: Record) -> str:
    return f"[{record.key.seed}]({record.link}/)" if record.link else f"[{record.key.seed}](summary.csv)"


def points_text(value: Spread) -> str:
    """Mean and deviation of a metric in points."""
    if value.n == 0:
        return NOTHING
    return f"{100 * value.mean:.1f}" + (f" ± {100 * value.deviation:.1f}" if value.n > 1 else "")


def gain_text(value: Spread) -> str:
    """A paired gain in points with its interval, between ** where that excludes zero."""
    if value.n == 0:
        return NOTHING
    if value.n == 1:
        return f"{100 * value.mean:+.1f} (one pair)"
    text = f"{100 * value.mean:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"
    return f"**{text}**" if value.sure else text


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.0f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def statistics_csv(study: Definition, tables: Mapping[str, Sequence[Row]]) -> str:
    """A row a grid, student and method: metrics 0 to 1 with deviations, gains with intervals, times, and the runs."""
    head = ["grid", "student", "method", "epochs", "seeds", "planned"]
    for name in METRICS:
        head += [name, f"{name}_sd", f"{name}_gain", f"{name}_gain_low", f"{name}_gain_high"]
    head += ["pairs", "step_seconds", "cpu_seconds", "seconds", "runs"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for title, table in tables.items():
        for row in table:
            cells = [title, row.student, row.method, row.epochs or "", len(row.records), row.planned]
            for name in METRICS:
                m, gain = row.metrics[name], row.gains.get(name)
                cells += [_csv_number(m.mean), _csv_number(m.deviation)]
                cells += ["", "", ""] if gain is None else [_csv_number(v) for v in (gain.mean, gain.low, gain.high)]
            cells += [row.gains["AP"].n if row.gains else ""]
            cells += [_csv_number(v) for v in (row.step_seconds, row.cpu_seconds, row.seconds)]
            writer.writerow([*cells, " ".join(r.link or f"summary.csv:{r.key.path}" for r in row.records)])
    return text.getvalue()


def _csv_number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.5g}"


def _comparisons(study: Definition, tables: Mapping[str, Sequence[Row]]) -> list[Comparison]:
    """One panel a grid and student that has something to compare, in AP points."""
    out = []
    for title, table in tables.items():
        for student in dict.fromkeys(row.student for row in table):
            part = [row for row in table if row.student == student and row.records]
            if any(row.gains and row.gains["AP"].n for row in part):
                grid = study.parts()[title]
                heading = f"{grid.title or title}: {student}"
                out.append(
                    Comparison(
                        heading,
                        [row.method for row in part],
                        [[100 * r.metrics["AP"] for r in row.records] for row in part],
                        [_bar(row.metrics["AP"], "deviation") for row in part],
                        [_bar(row.gains.get("AP"), "half") for row in part],
                        grid.baseline or "the plain student",
                    )
                )
    return out


def _bar(value: Spread | None, size: str) -> tuple[float, float] | None:
    """(mean, half length of the error bar) in points; a single value has a bar of no length."""
    if value is None or value.n == 0:
        return None
    half: float = getattr(value, size)
    return 100 * value.mean, 0.0 if math.isnan(half) else 100 * half
