"""HTML page of heat maps, detections, charts and tables, self-contained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from yoloxkd.viz.heat_maps import colormap_stops
from yoloxkd.viz.html_report import Chart, render


@dataclass(frozen=True, slots=True)
class Panel:
    """caption: the model and what it is; source: a data: address; note: its numbers."""

    caption: str
    source: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Panels:
    """Images side by side.

    Attributes:
        title: what they have in common
        high: value of the last color of their scale, whose first is 0, as text; empty: they are no heat maps
        unit: what the scale counts
        key: what lines and colors mean
    """

    title: str
    panels: Sequence[Panel]
    high: str = ""
    unit: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class ImageFigure:
    """What belongs to one image: groups of panels, then charts."""

    title: str
    groups: Sequence[Panels] = ()
    charts: Sequence[Chart] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A figure of the page: what it shows, a table over all images, and the images.

    Attributes:
        text: what to see in it
        columns, rows: of the table; the first column is text, the others numbers
        table_note: what its numbers count
    """

    title: str
    text: str
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    table_note: str = ""
    charts: Sequence[Chart] = ()
    images: Sequence[ImageFigure] = ()


@dataclass(slots=True)
class ExplainPage:
    """Texts are escaped; only a chart's SVG is not. facts: (name, value)."""

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    parts: list[Part] = field(default_factory=list)


def render_page(page: ExplainPage) -> str:
    """The page's HTML."""
    return render("explain.html.jinja", p=page, scale=", ".join(colormap_stops()))
