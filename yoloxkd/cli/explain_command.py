"""`yoloxkd explain`: the papers' figures for one's own models, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from yoloxkd.errors import UserError, nearest
from yoloxkd.kd import DISTILLERS
from yoloxkd.output_paths import Output, check_outputs, is_own_json

FIGURES = ("attention", "quality", "weights", "maps", "detections", "mask-out")
_TAUGHT = ("weights", "maps")
_KD = ("fgd", "pgd")


KDOption = Annotated[
    list[str] | None, typer.Option(help=f"Methods whose maps are shown: {', '.join(DISTILLERS)}. Default: fgd and pgd.")
]
PercentOption = Annotated[
    str | None, typer.Option(help="With --mask-out: the shares removed, 0 to 100. Default: 0,0.5,1,2,5,10,20,50,100.")
]
LimitOption = Annotated[
    int | None,
    typer.Option(min=1, help="Images of the split for detections and --mask-out, from the first. Default: all."),
]


def explain(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Checkpoints or names: the plain student, then distilled ones."),
    ],
    data: Annotated[str, typer.Option(help="Data YAML, a name, or 'shapes'.")],
    out: Annotated[Path, typer.Option(help="Folder for explain.html and explain.json.")],
    teacher: Annotated[str | None, typer.Option(help="NAME (its published weights) or checkpoint file.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    image: Annotated[
        list[str] | None,
        typer.Option(help="File name, or position from 0; may be repeated. Default: drawn at random."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images drawn, and images whose detections are shown.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    figure: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(FIGURES)}; may be repeated. Default: all but mask-out.")
    ] = None,
    kd: KDOption = None,
    mask_out: Annotated[
        bool, typer.Option("--mask-out", help="AP without the best predictions inside each box, over the split.")
    ] = False,
    percent: PercentOption = None,
    conf: Annotated[float, typer.Option(min=0, max=1, help="Least score of the detections shown.")] = 0.3,
    limit: LimitOption = None,
    imgsz: Annotated[int | None, typer.Option(help="Input size in px. Default: the first model's.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or a CUDA index. Default: CUDA when there is one.")
    ] = None,
) -> None:
    """Draw what teacher and student look at, what a distiller teaches, and where detections differ."""
    figures_to_draw = _figures_to_draw(figure or (), mask_out, percent, kd or (), teacher)
    page, numbers = out / "explain.html", out / "explain.json"
    outputs = [Output("--out", page, lambda _: is_own_json(numbers)), Output("--out", numbers)]
    check_outputs(outputs, [*models, data, *([] if teacher is None else [teacher])])
    from yoloxkd.cli.explaining import Choice, write_explanation

    choice = Choice(
        models=models,
        teacher=teacher,
        data=data,
        split=split,
        images=image or (),
        count=count,
        seed=seed,
        figures=figures_to_draw,
        methods=kd or _KD,
        percents=_numbers(percent),
        conf=conf,
        limit=limit,
        imgsz=imgsz,
        device=device,
    )
    write_explanation(choice, page, numbers)
    print(f"written: {page}, {numbers}")


def _figures_to_draw(
    figures: Sequence[str], mask_out: bool, percent: str | None, kd: Sequence[str], teacher: str | None
) -> tuple[str, ...]:
    """The figures to draw, in their order. UserError: one is unknown, or what it needs is not given."""
    for name in figures:
        if name not in FIGURES:
            raise UserError(f"unknown figure '{name}'; {nearest(name, FIGURES)}")
    default = tuple(f for f in FIGURES if f != "mask-out" and (teacher is not None or f not in _TAUGHT))
    requested = {*(figures or default), *(("mask-out",) if mask_out else ())}
    if percent is not None and "mask-out" not in requested:
        raise UserError("--percent belongs to --mask-out; give --mask-out too, or leave it out")
    if kd and "maps" not in requested:
        raise UserError(
            "--kd chooses the methods of the figure 'maps', which needs a --teacher and, with --figure, --figure maps"
        )
    if teacher is None and (teacher_figures := sorted(requested & set(_TAUGHT))):
        raise UserError(f"--figure {teacher_figures[0]} is about what a teacher teaches; give --teacher")
    return tuple(f for f in FIGURES if f in requested)


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--percent {text} is no list of numbers; give them with commas, such as 0,1,10") from None
