"""`yoloxkd val`: measure one model, or several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yoloxkd.api import Detector
from yoloxkd.assembly.run import newest_run
from yoloxkd.cli.run_tables import check_val_outputs, metrics_table, val_options, write_detections
from yoloxkd.cli.tables import table, write_json
from yoloxkd.config.without_folders import distinct_names, without_folders
from yoloxkd.errors import UserError
from yoloxkd.metrics.coco import COUNTED_FROM, ERROR_KINDS
from yoloxkd.metrics.measure import overall


def evaluate_models(
    models: Sequence[str],
    *,
    data: str,
    split: str,
    batch: int,
    imgsz: int | None,
    device: str | None,
    workers: int,
    sets: Sequence[str],
    errors: bool,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Measure every model on the split, print a table and write what is wanted; no model: the newest run's best student.

    UserError: an option cannot be used, or `out` is given for several models.
    """
    options = val_options(sets)
    if out is not None and len(models) > 1:
        raise UserError(
            f"--out is the folder of one model's metrics and detections, and {len(models)} models are given; use --json "
            "FILE for the numbers of several"
        )
    check_val_outputs(out, json_file, [data, *models])
    measured: dict[str, dict[str, Any]] = {}
    for model in models or [str(newest_run())]:
        detector = Detector(model, device or "auto")
        result = detector.evaluate(data, split, batch, imgsz, workers, errors, **options)
        measured[detector.source] = result.metrics
    print(f"{', '.join(measured)} on {data} {split}")
    print(metrics_table(result.metrics) if len(models) < 2 else _side_by_side(measured))
    if errors:
        print(errors_table({model: metrics["errors"] for model, metrics in measured.items()}))
    place = {"data": without_folders(data), "split": split}
    rows = zip(distinct_names(list(measured)), measured.values(), strict=True)
    results = [{"model": model, **place, **metrics} for model, metrics in rows]
    if out is not None:
        write_json(out / "metrics.json", results[0])
        print(f"written: {out / 'metrics.json'}, {write_detections(out, result)}")
    if json_file is not None:
        write_json(json_file, results[0] if len(models) < 2 else results)


def errors_table(errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Error types, a row a model: what each kind costs in AP50 points, and how many there are."""
    rows = []
    for model, kinds in errors.items():
        rows.append([model, *(f"{100 * one['AP50']:.1f} ({one['count']:g})" for one in kinds.values())])
    note = (
        "Each error type (TIDE): what it costs in AP50 points, and in brackets how many errors of detections of score "
        f"{COUNTED_FROM:g} and more."
    )
    return table(["errors", *ERROR_KINDS.values()], rows) + "\n" + note


def _side_by_side(measured: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [model, *("-" if value < 0 else f"{value:.4f}" for value in overall(metrics).values())]
        for model, metrics in measured.items()
    ]
    return table(["model", *overall(next(iter(measured.values())))], rows)
