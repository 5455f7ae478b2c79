"""HTML page of a run, self-contained: images and charts inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import cv2

from yoloxkd.data.io.images import read_image
from yoloxkd.write_image import encoded


@dataclass(frozen=True, slots=True)
class Chart:
    """title; svg: an <svg> element, put into the page as it is."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class Picture:
    """caption; source: a data: address."""

    caption: str
    source: str


@dataclass(frozen=True, slots=True)
class TeacherCard:
    """A teacher: facts as (name, value), the rows of its pairing plan (what, student, teacher, how)."""

    title: str
    facts: list[tuple[str, str]]
    plan: list[Sequence[str]]


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
    teachers: list[TeacherCard] = field(default_factory=list)
    kd_charts: list[Chart] = field(default_factory=list)
    metrics: list[tuple[str, str, str]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    classes: list[ClassRow] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""


def render_report(report: Report) -> str:
    """The page's HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    page = files("yoloxkd.viz").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(page).render(r=report, svg=Markup)


def inline_image(path: Path, caption: str) -> Picture:
    """An image file as a JPEG inside a data: address, a tenth of a PNG's size. UserError: it cannot be read."""
    content = encoded(read_image(str(path))[0], ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 85])
    return Picture(caption, "data:image/jpeg;base64," + base64.b64encode(content).decode())
