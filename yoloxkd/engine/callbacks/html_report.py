"""`report.html`: write the page of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from yoloxkd.config.load import write_yaml
from yoloxkd.config.strict import Strict
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.callbacks.csv_log import read_rows
from yoloxkd.engine.callbacks.learning_rate import read_learning_rates
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.callbacks.plots import sheet_of
from yoloxkd.engine.events import State
from yoloxkd.engine.provenance import read_environment
from yoloxkd.errors import UserError
from yoloxkd.metrics.measure import overall
from yoloxkd.types import TASK, LossName
from yoloxkd.viz.charts import line_chart
from yoloxkd.viz.html_report import Chart, ClassRow, Report, TeacherCard, inline_image, render_report

MEANING = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "objects below 32² px",
    "APm": "objects of 32² to 96² px",
    "APl": "objects above 96² px",
    "AR1": "recall with 1 detection an image",
    "AR10": "recall with 10 detections an image",
    "AR100": "recall with 100 detections an image",
    "ARs": "recall, objects below 32² px",
    "ARm": "recall, objects of 32² to 96² px",
    "ARl": "recall, objects above 96² px",
    "MR": "log-average miss rate, smaller is better",
    "JI": "Jaccard index",
}


class ReportConfig(Strict):
    """The report has no settings; `callbacks.report: false` leaves it out."""


class HtmlReport(NamedCallback):
    """Recipe, pairing plan, curves, numbers by class, images and environment in one self-contained file.

    Written when the run ends, also by an interruption or an error, and whenever callbacks.plots has drawn. A report that
    cannot be written is a warning: the trained student matters more.
    """

    name = "report"
    Config = ReportConfig
    default = True
    cfg: ReportConfig

    def on_epoch_end(self, state: State) -> None:
        if sheet_of(state.out, state.epoch + 1).is_file():
            self._write(state, None)

    def on_fit_end(self, state: State) -> None:
        self._write(state, None)

    def on_exception(self, state: State, error: BaseException) -> None:
        if (state.out / "results.csv").is_file():
            self._write(state, str(error) or type(error).__name__)

    def _write(self, state: State, ended_by: str | None) -> None:
        try:
            write_text(state.out / "report.html", render_report(collect(state, ended_by)))
        except Exception as error:
            state.say(f"warning: report.html was not written ({error})")


def collect(state: State, ended_by: str | None = None) -> Report:
    """What a run's report shows, from its state and its folder. `ended_by`: why the run did not finish."""
    rows = read_rows(state.out / "results.csv")
    recipe = state.recipe.model_dump(by_alias=True, mode="json")
    kd = state.extra.get("kd", {})
    methods = " + ".join(name.upper() for name in recipe["kd"]) if kd else ""
    best = state.extra.get("best_metrics", {})
    best_epoch = state.extra.get("best_epoch", -1) + 1
    epochs = [float(row["epoch"]) for row in rows]
    losses = {state.loss_name(k.removeprefix("loss/")): _column(rows, k) for k in rows[-1] if k.startswith("loss/")}
    return Report(
        title=f"{recipe['student']['name']}{f', distilled by {methods}' if methods else ''}",
        subtitle=f"{recipe['data']} · {state.out.resolve()}",
        tiles=_tiles(state, rows, best, best_epoch),
        notes=_notes(state, ended_by),
        charts=_charts(state, rows, epochs, losses),
        teachers=[_teacher(number, t) for number, t in enumerate(kd.get("teachers", []), start=1)],
        kd_charts=_kd_charts(epochs, losses) if kd else [],
        metrics=[(k, _number(v), MEANING.get(k, "")) for k, v in overall(best).items()],
        class_names=list(next(iter(best.get("per_class", {}).values()), {})),
        classes=[
            ClassRow(name, [v if v >= 0 else None for v in values.values()])
            for name, values in best.get("per_class", {}).items()
        ],
        pictures=_pictures(state.out / "plots"),
        environment=_environment(state.out / "environment.json"),
        recipe=write_yaml(recipe).rstrip(),
    )


def _tiles(state: State, rows: Sequence[Mapping[str, str]], best: dict[str, Any], epoch: int) -> list[tuple[str, str]]:
    numbers = overall(best)
    tiles = [(str(name), _number(numbers[name])) for name in ("AP", "AP50", "AP75", "MR", "JI") if name in numbers]
    if epoch:
        tiles.append(("best epoch", str(epoch)))
    tiles.append(("epochs done", f"{rows[-1]['epoch']} / {state.epochs}"))
    speeds = [v for v in _column(rows, "images_per_s") if v > 0]
    if speeds:
        tiles.append(("images/s", f"{median(speeds):.1f}"))
    parameters = sum(p.numel() for p in state.detector.parameters())
    return [*tiles, ("parameters", f"{parameters / 1e6:.2f} M")]


def _notes(state: State, ended_by: str | None) -> list[str]:
    notes = [f"This run did not finish: {ended_by}"] if ended_by else []
    if stopped := state.extra.get("early_stopping", {}).get("stopped"):
        notes.append(f"Stopped early: {stopped}.")
    backbone = str(state.extra.get("backbone", ""))
    return notes + ([backbone] if backbone.startswith("warning") else [])


def _charts(
    state: State, rows: Sequence[Mapping[str, str]], epochs: list[float], losses: dict[LossName, list[float]]
) -> list[Chart]:
    task = {str(name): values for name, values in losses.items() if name.source == TASK}
    charts = [Chart("Task loss, mean of an epoch", line_chart(epochs, task))]
    measured = {k: [v if v >= 0 else math.nan for v in _column(rows, k)] for k in overall(state.metrics)}
    shown = {str(k): measured[k] for k in ("AP", "AP50", "AP75", "AR100", "MR", "JI") if k in measured}
    charts.append(Chart(f"Metrics on {state.recipe.val.split}", line_chart(epochs, shown, log=False, from_zero=True)))
    file = state.out / "learning_rate.csv"
    if file.is_file() and (steps := read_learning_rates(file)):
        x, rates = [float(s[0]) for s in steps], [float(s[2]) for s in steps]
        charts.append(Chart("Learning rate", line_chart(x, {"lr": rates}, x_label="step", log=False)))
    else:
        charts.append(Chart("Learning rate", line_chart(epochs, {"lr": _column(rows, "lr")}, log=False)))
    speed = {"images/s": _column(rows, "images_per_s")}
    return [*charts, Chart("Images a second", line_chart(epochs, speed, log=False, from_zero=True))]


def _kd_charts(epochs: list[float], losses: dict[LossName, list[float]]) -> list[Chart]:
    """Where the loss comes from, then one chart a term with a curve a level."""
    sources: dict[str, list[float]] = {}
    terms: dict[str, dict[str, list[float]]] = {}
    for name, values in losses.items():
        source = name.source
        filled = [0.0 if math.isnan(v) else v for v in values]
        sources[source] = [a + b for a, b in zip(sources.get(source, [0.0] * len(values)), filled, strict=True)]
        if source != TASK:
            level = "all levels" if name.level is None else f"stride {name.level}"
            terms.setdefault(f"{source}: {name.term.replace('_', ' ')}", {})[level] = values
    size = (3.9, 2.3)
    charts = [Chart("Where the loss comes from", line_chart(epochs, sources, size=size))]
    return charts + [Chart(title, line_chart(epochs, curves, size=size)) for title, curves in terms.items()]


def _teacher(number: int, teacher: Mapping[str, Any]) -> TeacherCard:
    ap = teacher.get("ap")
    facts = [
        ("weights", str(teacher["source"])),
        ("sha256", str(teacher["digest"])),
        ("loaded", f"{teacher['share']:.1%} of its parameters"),
        ("weight", f"{teacher['weight']:g}"),
        ("AP in the classes it knows", "not measured" if ap is None else f"{ap:.4f}"),
    ]
    return TeacherCard(f"Teacher {number}", facts, [tuple(map(str, row)) for row in teacher.get("table", [])])


def _pictures(plots: Path) -> list[Any]:
    file = plots / "predictions.png"
    if not file.is_file():
        return []
    return [inline_image(file, "Validation images: ground truth on the left, the student's detections on the right")]


def _environment(file: Path) -> list[tuple[str, str]]:
    try:
        about = read_environment(file)
    except UserError as error:  # changed while the run went on; the rest of the page is worth having
        return [("not shown", str(error))]
    others = (about.model_extra or {}).items()
    shown = [(k.replace("_", " "), str(v)) for k, v in others if k not in ("kd", "backbone") and v is not None]
    if git := about.git:
        changed = git.changed
        state = "state unknown" if changed is None else f"{len(changed)} changed files" if changed else "clean"
        shown.append(("git", f"{git.commit} on {git.branch}, {state}"))
    if about.resumed:
        shown.append(("resumed", "; ".join(f"{r.started} in epoch {r.epoch}" for r in about.resumed)))
    return [*shown, ("packages", ", ".join(f"{name} {version}" for name, version in about.packages.items()))]


def _column(rows: Sequence[Mapping[str, str]], name: str) -> list[float]:
    return [float(row[name]) if row.get(name) else math.nan for row in rows]


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "–"
