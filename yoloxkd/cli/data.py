"""`yoloxkd data`: check, convert, look at and fetch data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yoloxkd.config.files import cfg_names
from yoloxkd.data import FORMATS

app = typer.Typer(no_args_is_help=True, help="Check, convert, look at and fetch data sets.")

DataArgument = Annotated[str, typer.Argument(metavar="DATA", help="Data YAML, a name, or 'shapes'.")]
SplitOption = Annotated[str | None, typer.Option(help="Only this split. Default: all.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write what the screen shows to this file.")]


@app.command()
def check(
    data: DataArgument,
    limit: Annotated[int | None, typer.Option(min=0, help="Places shown of a kind of fault. Default: all.")] = None,
    json_file: JsonOption = None,
    imgsz: Annotated[
        int, typer.Option(min=1, help="Input size in px of the training, which objects may be too small for.")
    ] = 640,
) -> None:
    """List every fault with file and line; exit status 2 when one would break training."""
    from yoloxkd.cli.data_report import check_report

    check_report(data, limit, json_file, imgsz)


@app.command()
def stats(
    data: DataArgument,
    split: SplitOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for samples, chart and stats.json. Default: runs/data/NAME.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="ImageColumns on the sheet of samples of a split.")] = 12,
    json_file: JsonOption = None,
) -> None:
    """Count boxes per class and size, and draw samples and a chart."""
    from yoloxkd.cli.data_report import stats_report

    stats_report(data, split, out, samples, json_file)


@app.command()
def convert(
    data: DataArgument,
    to: Annotated[str, typer.Option(help=", ".join(FORMATS) + "; cityscapes is read alone.")],
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    classes: Annotated[str | None, typer.Option(help="Keep these classes only: NAME,NAME,...")] = None,
    link: Annotated[bool, typer.Option("--link", help="Link to the images instead of copying them.")] = False,
) -> None:
    """Write a data set in another format, with its images and a data YAML, and say what the format cannot hold."""
    from yoloxkd.cli.data_report import convert_report

    convert_report(data, to, output, classes, link)


@app.command()
def download(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help=f"A data set of cfg/data: {', '.join(cfg_names('data'))}.")
    ],
    keep: Annotated[bool, typer.Option("--keep", help="Keep the archives after unpacking.")] = False,
) -> None:
    """Fetch a public data set into the folder its data YAML names; run again to continue where it stopped."""
    from yoloxkd.cli.data_report import download_report

    download_report(name, keep)
