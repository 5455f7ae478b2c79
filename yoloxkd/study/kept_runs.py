"""Results kept of finished runs: a small folder a run, and a row in summary.csv."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yoloxkd.engine.atomic import write_text
from yoloxkd.errors import UserError
from yoloxkd.study.files import (
    METRICS,
    ChosenFile,
    CostFile,
    EnvironmentFile,
    ReportedFile,
    RunFile,
    read_file,
    read_table,
    speeds,
)
from yoloxkd.study.origins import AtHand, kept_differences, origin, weights_digest
from yoloxkd.study.plan import Key, Run, differences
from yoloxkd.version import __version__

SUMMARY = ("study", "student", "method", "seed", "epochs", *METRICS, "seconds")


@dataclass(frozen=True)
class Record:
    """A finished run.

    metrics       on the reported split, 0 to 1; -1 where nothing could be measured
    chosen        AP of the best epoch on the choosing split, that epoch (1 is the first) and the split; None: not known
    seconds       wall time of the training, evaluations during it included
    cpu_seconds   processor time of the same, loader processes included; None: not known
    step_seconds  median over the epochs of the wall time of a step; None: not known
    link          its folder, relative to the results' folder; None: only a row of summary.csv is known
    split         the one that was reported; None: not known
    errors        error types on the reported split, as `metrics.coco.error_types`; empty: not known
    """

    key: Key
    epochs: int
    metrics: Mapping[str, float]
    seconds: float
    cpu_seconds: float | None = None
    step_seconds: float | None = None
    chosen: Mapping[str, float | str] | None = None
    link: str | None = None
    split: str | None = None
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def folder_of(results: Path, study: str, key: Key) -> Path:
    return results / study / key.path


def keep(run: Run, study: str, results: Path, report_split: str) -> Record:
    """Copy what is worth keeping of a finished run into the results' folder: results.csv and run.json."""
    folder = folder_of(results, study, run.key)
    folder.mkdir(parents=True, exist_ok=True)
    test = read_file(ReportedFile, run.folder / "test.json")
    made_from = origin(run)
    measured_on = {} if test.split_digest is None else {report_split: test.split_digest}
    left_out = {"model", "data", "split", "split_digest", "weights_digest"}
    about: dict[str, Any] = {
        "study": study,
        "student": run.key.student,
        "method": run.key.method,
        "seed": run.key.seed,
        "epochs": run.epochs,
        "split": report_split,
        "metrics": test.model_dump(exclude_unset=True, exclude=left_out),
        "weights": weights_digest(run.best),
        "version": __version__,
        **made_from,
        "data_digests": measured_on | made_from["data_digests"],
    }
    if run.recipe is not None:
        validation = read_file(ChosenFile, run.folder / "metrics.json")
        costs = run.folder / "cost.json"
        cost = read_file(CostFile, costs) if costs.is_file() else None
        environment = read_file(EnvironmentFile, run.folder / "environment.json")
        speed = statistics.median(speeds(run.folder / "results.csv"))
        about |= {
            "chosen": validation.overall() | {"epoch": validation.epoch, "split": validation.split},
            "seconds": round(cost.wall if cost else 0.0, 1),
            "cpu_seconds": round(cost.cpu, 1) if cost else None,
            "step_seconds": round(run.recipe.train.batch / max(speed, 1e-9), 5),
            **{key: getattr(environment, key) for key in ("torch", "processor", "device", "threads")},
            "commit": environment.git.commit if environment.git else None,
            "settings": run.settings,
        }
        if (run.folder / "results.csv").resolve() != (folder / "results.csv").resolve():
            shutil.copyfile(run.folder / "results.csv", folder / "results.csv")
    write_text(folder / "run.json", json.dumps(about, indent=1) + "\n")
    return _record(folder / "run.json", results)


def read_records(results: Path, study: str) -> dict[Key, Record]:
    """The runs of a study that a results' folder knows: by their own folders, else by their rows in summary.csv."""
    records = {row.key: row for name, row in _summary(results / "summary.csv") if name == study}
    for file in sorted((results / study).glob("**/run.json")):
        record = _record(file, results)
        records[record.key] = record
    return records


def check_record(run: Run, record: Record, results: Path, here: AtHand) -> None:
    """Refuse a kept result that was not made as the study now says, or from other data, weights or teachers. UserError."""
    mismatches = [] if record.epochs == run.epochs else [f"epochs {record.epochs} instead of {run.epochs}"]
    if record.link is not None:
        recorded = read_file(RunFile, results / record.link / "run.json")
        mismatches += differences(recorded.settings, run.settings) + kept_differences(run, recorded, here)
    refuse_record(run, mismatches, results)


def refuse_record(run: Run, mismatches: Sequence[str], results: Path) -> None:
    """UserError: a kept result differs from what the study now says, in what `mismatches` name; none of them: it does not."""
    if mismatches:
        raise UserError(
            f"the result of {run.key.path} in {results} was made with other settings ({'; '.join(mismatches[:3])}); give "
            "another --results folder, or remove it there to have it run again"
        )


def write_summary(results: Path, study: str, records: Mapping[Key, Record]) -> Path:
    """One row a run in summary.csv, metrics 0 to 1; rows of other studies, and of runs not among these, stay."""
    path = results / "summary.csv"
    rows = [(name, row) for name, row in _summary(path) if name != study or row.key not in records]
    rows += [(study, row) for row in records.values()]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SUMMARY)
    for name, row in rows:
        values = [f"{row.metrics[metric]:.4f}" for metric in METRICS]
        writer.writerow(
            [name, row.key.student, row.key.method, row.key.seed, row.epochs, *values, f"{row.seconds:.1f}"]
        )
    results.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    return path


def _summary(path: Path) -> list[tuple[str, Record]]:
    if not path.is_file():
        return []
    out = []
    for number, row in enumerate(read_table(path), 2):
        try:
            key = Key(row["student"], row["method"], int(row["seed"]))
            metrics = {name: float(row[name]) for name in METRICS}
            seconds = float(row["seconds"])
            if not all(-1 <= value <= 1 for value in metrics.values()) or not 0 <= seconds < math.inf:
                raise ValueError("a metric is from -1 to 1, and seconds are at least 0")
            out.append((row["study"], Record(key, int(row["epochs"]), metrics, seconds)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"line {number} of {path} is not a result: it needs {', '.join(SUMMARY)}") from error
    return out


def _record(path: Path, results: Path) -> Record:
    """The record in a `run.json`. UserError: it is none."""
    about = read_file(RunFile, path)
    return Record(
        Key(about.student, about.method, about.seed),
        about.epochs,
        about.metrics.overall(),
        about.seconds,
        about.cpu_seconds,
        about.step_seconds,
        about.chosen,
        path.parent.relative_to(results).as_posix(),
        about.split,
        about.metrics.errors,
    )
