"""The command `study`; what it does is in studying.py, which imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def study(
    recipe: Annotated[str, typer.Argument(help="Study YAML, or the name of a shipped one.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: runs/study/NAME.")] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of kept results: what it knows is not run again. Default: OUT/results."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    grid: Annotated[list[str] | None, typer.Option(help="Do only the runs of this grid; may be repeated.")] = None,
    data: Annotated[str | None, typer.Option(help="Where the study's data set is on this machine.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A checkpoint instead of the study's own teacher.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or a CUDA index. Default: CUDA when there is one.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Loader processes of a run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and what is done, and stop.")] = False,
    collect: Annotated[
        bool, typer.Option("--collect", help="Keep what is finished, write the tables, run nothing.")
    ] = False,
) -> None:
    """Train the same students with and without each distiller, over several seeds, and compare."""
    from yoloxkd.cli.studying import run_study

    run_study(
        recipe,
        out=out,
        results=results,
        jobs=jobs,
        grids=grid or (),
        data=data,
        teacher=teacher,
        device=device,
        workers=workers,
        dry_run=dry_run,
        collect=collect,
    )
