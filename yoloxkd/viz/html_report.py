"""HTML page of a run, self-contained: images and charts inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2

from yoloxkd.data.io.images import read_image
from yoloxkd.types import LossName
from yoloxkd.write_image import encoded


@dataclass(frozen=True, slots=True)
class Chart:
    """title; svg: an <svg> element, put into the page as it is."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class InlineImage:
    """caption; source: a data: address."""

    caption: str
    source: str


@dataclass(frozen=True, slots=True)
class Card:
    """Facts, and a table.

    Attributes:
        title: Its heading.
        facts: (name, value).
        columns: Headings of the table.
        rows: A text for each column; none: there is no table.
    """

    title: str
    facts: Sequence[tuple[str, str]] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading of its own: cards, then charts side by side."""

    title: str
    cards: Sequence[Card] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True, slots=True)
class ReportPart:
    """What a callback adds to the page.

    Attributes:
        title: Comes after the model's name in the heading.
        notes: Remarks at the top of the page.
        sections: Come after the curves of the training.
    """

    title: str = ""
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True, slots=True)
class LossHistory:
    """Means of the losses over epochs.

    Attributes:
        epochs: Numbers of the epochs, from 1.
        losses: Each loss at each of them; NaN where it has none.
    """

    epochs: list[float]
    losses: dict[LossName, list[float]]


@dataclass(frozen=True, slots=True)
class ClassRow:
    """The numbers of a class, 0 to 1, or None where there is nothing to measure."""

    name: str
    values: list[float | None]


@dataclass(slots=True)
class Report:
    """What the page shows. Texts are escaped; only a chart's SVG is not.

    tiles        (label, value) of the few numbers that matter most
    notes        warnings and remarks
    metrics      (name, value, what it means)
    class_names  names of the columns of `classes`
    """

    title: str
    subtitle: str
    tiles: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    metrics: list[tuple[str, str, str]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    classes: list[ClassRow] = field(default_factory=list)
    images: list[InlineImage] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""


def render_report(report: Report) -> str:
    """The page's HTML."""
    return render("report.html.jinja", r=report)


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder; texts are escaped, `svg(text)` is put as it is."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    folder = files("yoloxkd.viz")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(svg=Markup, **values)


def inline_image(path: Path, caption: str) -> InlineImage:
    """An image file as a JPEG inside a data: address, a tenth of a PNG's size. UserError: it cannot be read."""
    content = encoded(read_image(str(path))[0], ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 85])
    return InlineImage(caption, "data:image/jpeg;base64," + base64.b64encode(content).decode())
