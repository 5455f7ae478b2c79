"""Charts as SVG for a page; text takes the page's font and color."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#eab308", "#ec4899", "#84cc16", "#64748b")
"""Mid tones, so that a line shows on white and on black."""
DISTINCT = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#009E73", "#808080")
"""Colors that color-blind people tell apart (Okabe and Ito, 2008); with `_MARKERS` and `_DASHES` also in print."""
_MARKERS, _DASHES = "osD^vP*", ("-", "--", "-.", ":")
_INK = "#808080"


def legend_name(name: str) -> str:
    """A curve's name for the legend, which leaves out names that begin with _ and takes $ for mathematics."""
    return (f" {name}" if name.startswith("_") else name).replace("$", r"\$")


def line_chart(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    size: tuple[float, float] = (5.2, 2.7),
    x_label: str = "epoch",
    y_label: str = "",
    log: bool | None = None,
    from_zero: bool = False,
    ticks: Sequence[float] | None = None,
) -> str:
    """An <svg> element with one line a curve.

    x (n,), each curve (n,); nan is a gap that is joined over. size in inches, of which the page makes what fits. `log`
    None: where all values are positive and span more than two decades. `ticks`: of an x axis that is linear up to 1 and
    logarithmic beyond; each curve has a marker and a dash of its own there.
    """
    from matplotlib.ticker import MaxNLocator

    with _figure(size) as drawing:
        axes = drawing.figure.subplots()
        shown = []
        for number, (name, values) in enumerate(curves.items()):
            points = [(a, b) for a, b in zip(x, values, strict=True) if math.isfinite(b)]
            if points:
                style = _style(number, len(points), ticks is not None)
                axes.plot(*zip(*points, strict=True), linewidth=1.6, label=legend_name(name), **style)
                shown += [b for _, b in points]
        if shown and (log or (log is None and min(shown) > 0 and max(shown) / min(shown) > 100)):
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        if ticks is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        else:
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
            axes.set_xlim(ticks[0] - 0.05, ticks[-1] * 1.1 + 0.05)
            axes.minorticks_off()
        axes.set_xlabel(x_label, color=_INK)
        axes.set_ylabel(y_label, color=_INK)
        _style_axes(axes)
        if shown and (len(curves) > 1 or ticks is not None):
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK, ncols=1 + (len(curves) > 5))
    return drawing.svg


def bar_rows(rows: Mapping[str, Sequence[float]], *, x_label: str, y_label: str, width: float = 5.2) -> str:
    """An <svg> element with a row of bars for each name, one below the other on the same axes, colored by name."""
    with _figure((width, 0.55 + 0.85 * len(rows))) as drawing:
        panels = drawing.figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for number, (axes, (name, values)) in enumerate(zip(panels, rows.items(), strict=True)):
            edges = [place - 0.5 for place in range(len(values) + 1)]
            axes.stairs(values, edges, fill=True, color=DISTINCT[number % len(DISTINCT)])
            axes.set_title(name.replace("$", r"\$"), fontsize=8, loc="left", color=_INK, pad=2)
            _style_axes(axes)
        panels[-1].set_xlabel(x_label, color=_INK)
        drawing.figure.supylabel(y_label, color=_INK, fontsize=9)
    return drawing.svg


def _style(number: int, points: int, distinct: bool) -> dict[str, Any]:
    if not distinct:
        few = "." if points <= 40 else ""
        line = "-" if number < len(PALETTE) else "--"
        return {"color": PALETTE[number % len(PALETTE)], "linestyle": line, "marker": few}
    return {
        "color": DISTINCT[number % len(DISTINCT)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
    }


@dataclass(slots=True)
class _Drawing:
    figure: Any
    svg: str = ""


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[_Drawing]:
    """A transparent figure, whose SVG is there after the block."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "yoloxkd", "font.size": 9}):
        drawing = _Drawing(Figure(figsize=size, layout="constrained"))
        FigureCanvasSVG(drawing.figure)
        drawing.figure.patch.set_alpha(0)
        yield drawing
        out = io.StringIO()
        drawing.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # the page decides how wide it is
    drawing.svg = re.sub(
        r'^<svg([^>]*?) width="[^"]*"([^>]*?)', r"<svg\1\2", re.sub(r' height="[^"]*"', "", svg, count=1)
    )


def _style_axes(axes: Any) -> None:
    """Thin axes to the left and below, in a color that shows on white and on black."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK, length=3)
    axes.grid(True, color=_INK, alpha=0.2, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
