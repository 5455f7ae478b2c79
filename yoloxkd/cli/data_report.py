"""What `yoloxkd data` prints and writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from yoloxkd.cli.tables import table, write_json
from yoloxkd.config.without_folders import without_folders
from yoloxkd.data.check import SplitReport, check_data
from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import DataSpec, find_data, load_split
from yoloxkd.data.download import download_data
from yoloxkd.data.stats import SIZES, SplitStats, split_stats
from yoloxkd.errors import UserError
from yoloxkd.output_paths import Output, check_outputs, is_own_json


def check_report(name: str, limit: int | None, json_file: Path | None, imgsz: int = 640) -> None:
    """Print every fault of a data set. UserError when one of them would break training."""
    check_outputs([] if json_file is None else [Output("--json", json_file)], [name])
    spec = find_data(name)
    with _progress("looking at the images") as progress:
        reports = check_data(spec, progress, imgsz)
    print(f"{name}: format {spec.format}, {len(spec.names)} classes, {spec.root}")
    for report in reports:
        print("\n".join(_split_lines(report, limit)))
    breaking = sum(report.breaking for report in reports)
    total = sum(len(report.faults) for report in reports)
    if json_file is not None:
        splits = {report.split: report.as_dict() for report in reports}
        head = {"data": without_folders(name), "format": spec.format, "breaking": breaking}
        write_json(json_file, head | {"splits": without_folders(splits, [str(spec.root), name], inside=spec.root)})
    if breaking:
        raise UserError(f"{breaking} of the {total} faults of {name} would break training; correct those marked with !")
    print(f"{total} faults, none of which breaks training" if total else "no fault")


def _split_lines(report: SplitReport, limit: int | None) -> Iterator[str]:
    ignored = f", {report.ignored} to ignore" if report.ignored else ""
    ignored += f", {report.masks} masks" if report.masks else ""
    yield f"{report.split}: {report.images} images, {report.boxes} boxes{ignored}"
    for kind, count in report.faults.counts.items():
        yield f"  {'!' if kind in report.faults.breaking else ' '} {count} {kind}"
        places = report.faults.examples.get(kind, [])
        shown = places if limit is None else places[:limit]
        yield from (f"        {problem}" for problem in shown)
        if len(shown) < len(places):
            yield f"        ... and {len(places) - len(shown)} more"


def stats_report(name: str, split: str | None, out: Path | None, samples: int, json_file: Path | None) -> None:
    """Print counts by class and size; write samples-<split>.png, chart.png and stats.json."""
    from yoloxkd.viz.data_sheet import draw_counts, draw_samples

    spec = find_data(name)
    folder = Path("runs") / "data" / _short_name(name) if out is None else out
    splits = spec.splits if split is None else [split]
    _check_stats_folder(spec, folder, [*(f"samples-{one}.png" for one in splits), "chart.png"], json_file)
    read = [load_split(spec, one, masks=True) for one in splits]
    statistics = [split_stats(data) for data in read]
    for data, stats in zip(read, statistics, strict=True):
        print(stats_text(stats) + ("" if not len(data.faults) else f"\n{data.faults.describe()}"))
    results: dict[str, Any] = {
        "data": without_folders(name),
        "splits": {stats.split: stats.as_dict() for stats in statistics},
    }
    for file in (folder / "stats.json", *([] if json_file is None else [json_file])):
        write_json(file, results)  # before the images: it tells the next time that they are this command's
    written = [_draw_file(folder / f"samples-{d.split}.png", partial(draw_samples, d, count=samples)) for d in read]
    written.append(_draw_file(folder / "chart.png", partial(draw_counts, statistics)))
    print(f"written: {', '.join(map(str, [*written, folder / 'stats.json']))}")


def _short_name(data: str) -> str:
    """A data set's name, or its file's; of a file that is called as most are, that of its folder."""
    path = Path(data)
    return path.stem if path.stem not in ("data", "dataset") else path.resolve().parent.name or path.stem


def _check_stats_folder(spec: DataSpec, folder: Path, file_names: Sequence[str], json_file: Path | None) -> None:
    """UserError: the images would be taken for the data set's, or would replace something else."""
    whole = folder.resolve()
    for image_folder in spec.image_folders():
        if image_folder.resolve() in (whole, *whole.parents):
            raise UserError(
                f"--out {folder} is in {image_folder}, where {spec.name} has its images, so what is drawn would be taken for "
                "images of it; give a folder elsewhere"
            )
    outputs = [Output("--out", folder / name, lambda _: is_own_json(folder / "stats.json")) for name in file_names]
    outputs.append(Output("--out", folder / "stats.json"))
    outputs += [] if json_file is None else [Output("--json", json_file)]
    check_outputs(outputs, [spec.name])


def _draw_file(file: Path, draw: Callable[[Path], Path]) -> Path:
    try:
        return draw(file)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def stats_text(stats: SplitStats) -> str:
    """A split's table: boxes by class and size, images with the class, and a line about its images."""
    values = stats.as_dict()
    rows = [[name, *(str(row[key]) for key in ("boxes", *SIZES, "images"))] for name, row in values["classes"].items()]
    sums = [str(int(n)) for n in (stats.by_class.sum(), *stats.by_class.sum(0))]
    rows.append(["all", *sums, str(stats.images - stats.empty)])
    head = f"{stats.split}: {stats.images} images ({stats.empty} without a box), {stats.ignored} boxes to ignore"
    head += f", {stats.masks} masks" if stats.masks else ""
    w, h, per = (values[key] for key in ("width", "height", "boxes_per_image"))
    tail = (
        f"images {w['least']:.0f}x{h['least']:.0f} to {w['most']:.0f}x{h['most']:.0f} px, median "
        f"{w['median']:.0f}x{h['median']:.0f}; {per['least']:.0f} to {per['most']:.0f} boxes an image, median "
        f"{per['median']:.0f}"
    )
    return f"{head}\n{table(['class', 'boxes', *SIZES, 'images'], rows)}\n{tail}"


def convert_report(name: str, to: str, output: Path, classes: str | None, link: bool) -> None:
    """Convert, and print what each split holds and what the format could not."""
    class_names = None if classes is None else _split_commas(classes)
    done = convert_data(find_data(name), to, output, class_names, link)
    print("\n".join(done.lines))
    print(f"written: {done.yaml}")


def _split_commas(text: str) -> Sequence[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def download_report(name: str, keep: bool) -> None:
    """Fetch a data set, and say how to use it."""
    folder = download_data(name, keep)
    print(f"{name} is in {folder}; use it with --data {name}, look at it with: yoloxkd data check {name}")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal: call it with what is done and of how much."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
