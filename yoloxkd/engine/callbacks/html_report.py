"""`report.html`: write the page of a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from yoloxkd.config.load import write_yaml
from yoloxkd.config.strict import Strict
from yoloxkd.config.without_folders import command_without_folders, without_folders
from yoloxkd.engine.atomic import write_text
from yoloxkd.engine.callbacks.csv_log import read_rows
from yoloxkd.engine.callbacks.learning_rate import read_learning_rates
from yoloxkd.engine.callbacks.named import NamedCallback
from yoloxkd.engine.callbacks.plots import sheet_of
from yoloxkd.engine.callbacks.run_folder import callback_entries
from yoloxkd.engine.events import State
from yoloxkd.engine.provenance import read_environment
from yoloxkd.errors import UserError
from yoloxkd.metrics.coco import COUNTED_FROM, ERROR_MEANING
from yoloxkd.metrics.measure import overall
from yoloxkd.types import TASK
from yoloxkd.viz.charts import line_chart
from yoloxkd.viz.html_report import (
    Card,
    Chart,
    ClassRow,
    LossHistory,
    Report,
    Section,
    inline_image,
    render_report,
)

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

_OF_THE_MACHINE = ("host", "folder")


class ReportConfig(Strict):
    """The report has no settings; `callbacks.report: false` leaves it out."""


class HtmlReport(NamedCallback):
    """Recipe, curves, numbers by class, images, environment and what callbacks add in one self-contained file.

    It is meant for others: no absolute path and no name of the machine is on it.

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
    """What a run's report shows, from its state, its folder and its callbacks.

    Args:
        state: Of the run.
        ended_by: Why the run did not finish.
    """
    rows = read_rows(state.out / "results.csv")
    recipe = state.recipe.model_dump(by_alias=True, mode="json")
    losses = {state.loss_name(k.removeprefix("loss/")): _column(rows, k) for k in rows[-1] if k.startswith("loss/")}
    history = LossHistory([float(row["epoch"]) for row in rows], losses)
    parts = [part for callback in state.callbacks if (part := callback.report(state, history))]
    numbers = overall(state.best.metrics) if state.best else {}
    per_class = state.best.metrics.get("per_class", {}) if state.best else {}
    report = Report(
        title=", ".join([recipe["student"]["name"], *(part.title for part in parts if part.title)]),
        subtitle=f"{without_folders(recipe['data'])} · {state.out.resolve().name}",
        tiles=_tiles(state, rows, numbers),
        notes=[
            *([f"This run did not finish: {ended_by}"] if ended_by else []),
            *(n for part in parts for n in part.notes),
        ],
        charts=_charts(state, rows, history),
        sections=[*(section for part in parts for section in part.sections), *_errors(state)],
        metrics=[(k, _number(v), MEANING.get(k, "")) for k, v in numbers.items()],
        class_names=list(next(iter(per_class.values()), {})),
        classes=[
            ClassRow(name, [v if v >= 0 else None for v in values.values()]) for name, values in per_class.items()
        ],
        images=_sample_images(state.out / "plots"),
        environment=_environment(state.out / "environment.json", callback_entries(state)),
        recipe=write_yaml(without_folders(recipe)).rstrip(),
    )
    named_paths = [state.recipe.data, state.recipe.student.weights, *state.recipe.teacher.models]
    return _for_others(report, [str(Path.cwd()), str(state.out), str(state.out.resolve()), *filter(None, named_paths)])


def _for_others(report: Report, paths: Sequence[str]) -> Report:
    """The page with the names of files alone in its texts. `paths`: those that they may hold (see `without_folders`)."""
    paths = [path for path in paths if Path(path).is_absolute()]
    sections = []
    for section in report.sections:
        cards = [
            Card(*without_folders((card.title, card.facts, card.columns, card.rows), paths)) for card in section.cards
        ]
        sections.append(replace(section, cards=cards))
    notes, environment = without_folders((report.notes, report.environment), paths)
    return replace(report, notes=notes, environment=environment, sections=sections)


def _errors(state: State) -> list[Section]:
    """The error types of the best student."""
    errors = state.best.metrics.get("errors") if state.best else None
    if not errors:
        return []
    rows = [[kind, f"{100 * one['AP50']:.1f}", str(one["count"]), ERROR_MEANING[kind]] for kind, one in errors.items()]
    facts = [("counted", f"detections of score {COUNTED_FROM:g} and more, at IoU 0.5")]
    columns = ("error", "costs AP50 points", "count", "what it is")
    return [Section("Errors", [Card("Errors of the best student (TIDE)", facts, columns, rows)])]


def _tiles(state: State, rows: Sequence[Mapping[str, str]], numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    tiles = [
        (str(name), _number(numbers[name])) for name in ("AP", "AP50", "AP75", "mask_AP", "MR", "JI") if name in numbers
    ]
    if state.best:
        tiles.append(("best epoch", str(state.best.epoch + 1)))
    tiles.append(("epochs done", f"{rows[-1]['epoch']} / {state.epochs}"))
    speeds = [v for v in _column(rows, "images_per_s") if v > 0]
    if speeds:
        tiles.append(("images/s", f"{median(speeds):.1f}"))
    parameters = sum(p.numel() for p in state.detector.parameters())
    return [*tiles, ("parameters", f"{parameters / 1e6:.2f} M")]


def _charts(state: State, rows: Sequence[Mapping[str, str]], history: LossHistory) -> list[Chart]:
    epochs = history.epochs
    task = {str(name): values for name, values in history.losses.items() if name.source == TASK}
    charts = [Chart("Task loss, mean of an epoch", line_chart(epochs, task))]
    measured = {k: [v if v >= 0 else math.nan for v in _column(rows, k)] for k in overall(state.metrics)}
    shown = {str(k): measured[k] for k in ("AP", "AP50", "AP75", "AR100", "mask_AP", "MR", "JI") if k in measured}
    charts.append(Chart(f"Metrics on {state.recipe.val.split}", line_chart(epochs, shown, log=False, from_zero=True)))
    file = state.out / "learning_rate.csv"
    if file.is_file() and (steps := read_learning_rates(file)):
        x, rates = [float(s[0]) for s in steps], [float(s[2]) for s in steps]
        charts.append(Chart("Learning rate", line_chart(x, {"lr": rates}, x_label="step", log=False)))
    else:
        charts.append(Chart("Learning rate", line_chart(epochs, {"lr": _column(rows, "lr")}, log=False)))
    speed = {"images/s": _column(rows, "images_per_s")}
    return [*charts, Chart("Images a second", line_chart(epochs, speed, log=False, from_zero=True))]


def _sample_images(plots: Path) -> list[Any]:
    file = plots / "predictions.png"
    if not file.is_file():
        return []
    return [inline_image(file, "Validation images: ground truth on the left, the student's detections on the right")]


def _environment(file: Path, shown_elsewhere: Collection[str]) -> list[tuple[str, str]]:
    """The facts of environment.json but for those of callbacks, which have their own places on the page."""
    try:
        about = read_environment(file)
    except UserError as error:  # changed while the run went on; the rest of the page is worth having
        return [("not shown", str(error))]
    others = {k: v for k, v in (about.model_extra or {}).items() if k not in (*_OF_THE_MACHINE, *shown_elsewhere)}
    if command := others.get("command"):
        others["command"] = command_without_folders(str(command))
    shown = [(k.replace("_", " "), str(v)) for k, v in others.items() if v is not None]
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
