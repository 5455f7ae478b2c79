"""The page and the numbers of `yoloxkd explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yoloxkd.api import Detector
from yoloxkd.cli.tables import table, write_json
from yoloxkd.config.without_folders import distinct_names, without_folders
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.engine.atomic import write_text
from yoloxkd.errors import UserError
from yoloxkd.explain import Model, check_percents, choose_images, load_scene
from yoloxkd.explain.figures import Numbers, Subjects, attention_part, maps_part, quality_part, weights_part
from yoloxkd.explain.mask_out import PERCENTS
from yoloxkd.explain.split_figures import detections_part, mask_out_part
from yoloxkd.types import ImageSize
from yoloxkd.viz.explain_page import ExplainPage, Part, render_page


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The options of the command."""

    models: Sequence[str]
    teacher: str | None
    data: str
    split: str
    images: Sequence[str]
    count: int
    seed: int
    figures: Sequence[str]
    methods: Sequence[str]
    percents: tuple[float, ...] | None
    conf: float
    limit: int | None
    imgsz: int | None
    device: str | None


def write_explanation(choice: Choice, page: Path, numbers: Path) -> None:
    """Draw the figures and write both files. UserError: a model, the data or an image does not serve."""
    percents = check_percents(PERCENTS if choice.percents is None else choice.percents)
    sources = [*choice.models, *([] if choice.teacher is None else [choice.teacher])]
    detectors = [Detector(source, choice.device or "auto") for source in sources]
    all_models = [Model(name, d.network) for name, d in zip(_names(sources), detectors, strict=True)]
    models, teacher = all_models[: len(choice.models)], all_models[-1] if choice.teacher is not None else None
    sizes = [detector.size(choice.imgsz) for detector in detectors]
    size = sizes[0]
    for detector in detectors[1:]:
        detector.size(size if isinstance(size, int) else None)
    spec = find_data(choice.data)
    data = load_split(spec, choice.split)
    drawn = choose_images(data, choice.images, choice.count, choice.seed)
    for model in all_models:
        model.classes(data.names)
    parts, figure_numbers = _draw(choice, models, teacher, data, drawn, size, percents, str(detectors[0].device))
    files, data_name = distinct_names(sources), without_folders(choice.data)
    facts = [
        ("models", ", ".join(f"{m.name}: {file}" for m, file in zip(models, files, strict=False))),
        *([] if teacher is None else [("teacher", f"{teacher.name}: {files[-1]}")]),
        ("data", f"{data_name}, split {choice.split}, {len(data)} images, {len(data.names)} classes"),
        (
            "input",
            f"{size} px" if isinstance(size, int) else f"short side {size[0]} px, long side at most {size[1]} px",
        ),
    ]
    head: dict[str, Any] = {"model": dict(zip([m.name for m in models], files, strict=False))}
    head |= {"teacher": None if teacher is None else files[-1], "data": data_name, "split": choice.split, "imgsz": size}
    write_json(numbers, head | figure_numbers)  # before the page: it tells the next time that both are this command's
    title = f"What {' and '.join(m.name for m in models)} look{'s' if len(models) == 1 else ''} at"
    under = "" if teacher is None else f"taught by {teacher.name}, "
    write_text(page, render_page(ExplainPage(title, f"{under}on {data_name} {choice.split}", facts, parts=parts)))
    for part in parts:
        if part.rows:
            print(f"{part.title}\n{table(list(part.columns), [list(row) for row in part.rows])}\n")


def _draw(
    choice: Choice,
    models: Sequence[Model],
    teacher: Model | None,
    data: DetectionData,
    drawn: Sequence[int],
    size: ImageSize,
    percents: Sequence[float],
    device: str,
) -> tuple[list[Part], dict[str, Numbers]]:
    """The parts of the page in the order of the figures, and the numbers of each."""
    for figure in {"quality", "weights", "mask-out"} & set(choice.figures):
        for model in (
            [teacher] if figure == "weights" and teacher is not None else [*models, *([teacher] if teacher else [])]
        ):
            model.check_tower(figure)
    multiple = max(m.detector.size_multiple for m in [*models, *([teacher] if teacher else [])])
    scenes = [load_scene(data, index, size, models[0].detector, multiple) for index in drawn]
    subjects = Subjects.with_outputs(models, teacher, scenes)
    limited_data = data if choice.limit is None else data.head(choice.limit)
    everyone = subjects.everyone
    parts: list[Part] = []
    numbers: dict[str, Numbers] = {}
    for figure in choice.figures:
        if figure == "attention":
            part, values = attention_part(subjects)
        elif figure == "quality":
            part, values = quality_part(subjects)
        elif figure == "detections":
            part, values = detections_part(
                models,
                limited_data
                if choice.limit is None or not choice.images
                else data.head(max(choice.limit, 1 + max(drawn))),
                size,
                count=choice.count,
                indices=drawn if choice.images else None,
                conf=choice.conf,
                device=device,
            )
        elif figure == "mask-out":
            part, values = mask_out_part(everyone, limited_data, size, percents)
        else:
            assert teacher is not None  # else the figure was refused
            taught = figure == "weights"
            part, values = weights_part(subjects, teacher) if taught else maps_part(subjects, teacher, choice.methods)
        parts.append(part)
        numbers[figure] = values
    return parts, numbers


def _names(sources: Sequence[str]) -> list[str]:
    """A name for each model: its run's folder, or its file; as much of the path as differs where those repeat. UserError: one comes twice."""
    if len(set(sources)) < len(sources):
        twice = next(source for source in sources if sources.count(source) > 1)
        raise UserError(f"{twice} is given twice; a model compared with itself says nothing")
    paths = [Path(source) for source in sources]
    short = [p.parent.name if p.stem in ("best", "last") and p.parent.name else p.stem for p in paths]
    long = distinct_names(sources)
    return [name if short.count(name) == 1 else file for name, file in zip(short, long, strict=True)]
