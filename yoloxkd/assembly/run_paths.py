"""Check that a new run may write into its folder."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from yoloxkd.config.recipe import Recipe
from yoloxkd.errors import UserError
from yoloxkd.output_paths import RUN_RECORDS, Output, check_outputs

_GROWS = ("train.log",)  # lines are added to it, so nothing of it is lost
_WEIGHTS = ("best.pt", "last.pt")


def check_run_paths(recipe: Recipe, out: Path, also: Iterable[str | Path | None] = ()) -> None:
    """UserError: a file of the new run would replace one that the run reads, trained weights, or a file of the user.

    also  further files the run was described by, such as its recipe
    What a run that was ended before its first checkpoint has left is replaced.
    """
    inputs = [*recipe.teacher.models, recipe.student.weights, recipe.data, *also]
    outputs = [Output("--out", file, _is_run_plot, record=True) for file in _plots(out)]
    outputs += [
        Output("--out", out / name, partial(_is_run_output, weights=name in _WEIGHTS), record=True)
        for name in RUN_RECORDS
        if name not in _GROWS
    ]
    check_outputs(outputs, [path for path in inputs if path is not None])


def _is_run_output(file: Path, weights: bool) -> bool:
    return not weights and (file.parent / "environment.json").is_file() and (file.parent / "train.log").is_file()


def _plots(out: Path) -> list[Path]:
    """The images that a run draws; of those with the number of an epoch, the ones that are there already."""
    folder = out / "plots"
    return [folder / "curves.png", folder / "predictions.png", *sorted(folder.glob("predictions-epoch-*.png"))]


def _is_run_plot(file: Path) -> bool:
    return _is_run_output(file.parent, weights=False)


def check_teachers(recipe: Recipe) -> list[str]:
    """Notes for the log about a teacher that is its own student. UserError: one teacher is given twice."""
    models = recipe.teacher.models
    for number, model in enumerate(models):
        if any(_same(model, other) for other in models[:number]):
            raise UserError(f"the teacher {model} is given twice; give it once, with teacher.weight for its share")
    start = recipe.student.weights
    if (
        recipe.kd
        and recipe.quantize.kind == "off"
        and start is not None
        and any(_same(start, model) for model in models)
    ):
        return [
            f"note: {start} is both the student's start and a teacher, so the student is compared with itself: the "
            "distillation begins with nothing to teach"
        ]
    return []


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    files = Path(one), Path(other)
    return all(file.is_file() for file in files) and files[0].samefile(files[1])
