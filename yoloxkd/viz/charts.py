"""Line charts as SVG for a page; text takes the page's font and color."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence

PALETTE = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#eab308", "#ec4899", "#84cc16", "#64748b")
"""Mid tones, so that a line shows on white and on black."""
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
    log: bool | None = None,
    from_zero: bool = False,
) -> str:
    """An <svg> element with one line a curve.

    x (n,), each curve (n,); nan is a gap that is joined over. size in inches, of which the page makes what fits. `log`
    None: where all values are positive and span more than two decades.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "yoloxkd", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        shown = []
        for number, (name, values) in enumerate(curves.items()):
            points = [(a, b) for a, b in zip(x, values, strict=True) if math.isfinite(b)]
            if points:
                few = "." if len(points) <= 40 else ""
                style = "-" if number < len(PALETTE) else "--"
                color = PALETTE[number % len(PALETTE)]
                axes.plot(
                    *zip(*points, strict=True), style, color=color, linewidth=1.6, marker=few, label=legend_name(name)
                )
                shown += [b for _, b in points]
        if shown and (log or (log is None and min(shown) > 0 and max(shown) / min(shown) > 100)):
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel(x_label, color=_INK)
        axes.tick_params(colors=_INK, length=3)
        axes.grid(True, color=_INK, alpha=0.2, linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        if len(curves) > 1 and shown:
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK, ncols=1 + (len(curves) > 5))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    # the page decides how wide it is
    return re.sub(r'^<svg([^>]*?) width="[^"]*"([^>]*?)', r"<svg\1\2", re.sub(r' height="[^"]*"', "", svg, count=1))
