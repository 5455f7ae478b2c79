"""`yoloxkd kd-check`: what distilling as set would do, before it is done. torch is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from yoloxkd.errors import GateError

if TYPE_CHECKING:
    from yoloxkd.assembly.kd_check import KDCheck
    from yoloxkd.kd.check.measure import StudentMeasured


SHOWN = 0.1


def kd_check(
    student: Annotated[str | None, typer.Option(help="Architecture, or checkpoint to start from.")] = None,
    teacher: Annotated[list[str] | None, typer.Option(help="NAME (its published weights) or checkpoint file.")] = None,
    kd: Annotated[list[str] | None, typer.Option(help="Method, or METHOD@SET; may be repeated. Default: pgd.")] = None,
    data: Annotated[str | None, typer.Option(help="Data YAML, a name, or 'shapes'.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Weights of the same student, such as a plain run's best.pt, to measure at as well."),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, max=1000, help="Training batches to measure.")] = 4,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images a step of the run; at most 16 are taken here.")
    ] = None,
    imgsz: Annotated[int | None, typer.Option(help="Input size in px, a multiple of the stride.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or a CUDA index. Default: CUDA if any.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes initial weights and which images are drawn.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or file. Default: the student's own.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any recipe key: a.b=value; may be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Check a distillation in two minutes: teacher, pairing, gradients, and a verdict. Exit status 3 where it would harm.

    Options are those of train. Nothing is trained, and no run's folder is written.
    """
    from rich.console import Console

    from yoloxkd.api.kd_check import kd_check as measure
    from yoloxkd.cli.tables import write_json
    from yoloxkd.config.without_folders import without_folders
    from yoloxkd.output_paths import Output, check_outputs

    check_outputs(
        [] if json_file is None else [Output("--json", json_file)],
        [name for name in (student, data, checkpoint, recipe, *(teacher or ())) if name is not None],
    )
    check = measure(
        student, teacher, kd, data, checkpoint, batches, batch, imgsz, device, seed, recipe, set_ or (), Console()
    )
    print(f"\nmeasured on {check.batches} training batches of {check.images} images; methods at their full weight")
    for one in check.students:
        print(_losses(check, one) + "\n\n" + _concentration(one) + "\n")
    print(_remarks(check))
    if json_file is not None:
        write_json(json_file, without_folders(check.as_dict()))
    if check.harm:
        raise GateError(check.verdict)
    print(f"verdict: {check.verdict}")


def _losses(check: KDCheck, student: StudentMeasured) -> str:
    """Every loss with its part in the loss and in the gradient."""
    from yoloxkd.cli.tables import table
    from yoloxkd.engine.gradients import ALL
    from yoloxkd.types import TASK, LossName

    rows = []
    for name, one in student.gradients.items():
        if (
            name.level is not None
            and name.term != ALL
            and one.norm < SHOWN * student.gradients[LossName(name.source, ALL)].norm
        ):
            continue
        parts = [
            value * student.factors[source.partition("@")[0]]
            for (source, term, level), value in check.floor.items()
            if source == name.source and name.term in (ALL, term) and name.level in (None, level)
        ]
        floor = f"{sum(parts):.3g}" if parts else "-"
        cosine = "-" if name.source == TASK else f"{one.cosine:+.2f}"
        rows.append(
            [str(name), f"{one.loss:.3g}", f"{student.loss_share(name):.1%}", f"{one.share:.3f}", cosine, floor]
        )
    factors = ", ".join(f"{method} {factor:.3g}" for method, factor in student.factors.items())
    columns = ["loss", "value", "share of loss", "gradient / task's", "cosine", "floor"]
    note = f"single terms of a level are shown from {SHOWN:.0%} of the method's gradient on; --json has them all"
    return f"student: {student.weights} (weight of {factors})\n" + table(columns, rows) + f"\n{note}"


def _concentration(student: StudentMeasured) -> str:
    from yoloxkd.cli.tables import table

    if not student.concentration:
        return "the method compares no maps, so its loss lies on no channels"
    rows = [
        [
            f"{one.source} {one.tap} stride {one.stride}",
            f"{one.share:.1%}",
            f"{one.channel_share:.0%} on {one.top_channels} of {one.channels}",
            f"{one.cell_share:.0%} on 1%",
        ]
        for one in student.concentration
    ]
    return table(["where it lies", "share of the method", "channels", "cells"], rows)


def _remarks(check: KDCheck) -> str:
    """Where the objects are, the floor, the students' AP, and all that stands out."""
    lines = ["objects by size: " + ", ".join(f"{part:.0%} at stride {s}" for s, part in check.objects.items())]
    if not check.floor:
        lines.append("floor: not measured, since the teacher sees the images at another scale")
    if check.student_ap is not None:
        lines.append(f"AP of {check.students[-1].weights}: {check.student_ap:.3f}")
    for finding in check.findings:
        kind = "harm" if finding.harm else "note"
        lines.append(f"{kind}: {finding.what}" + (f" (--set {finding.setting})" if finding.setting else ""))
    return "\n".join(lines)
