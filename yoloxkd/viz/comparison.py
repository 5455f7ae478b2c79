"""Plot of methods side by side with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Bar = tuple[float, float]
"""Mean, and half the length of its error bar."""

MEAN, GAIN = "tab:blue", "tab:green"


@dataclass(frozen=True)
class Comparison:
    """One row of the image.

    methods  names, top to bottom
    values   of each method: its single results
    means    of each method: mean and standard deviation
    gains    of each method: mean paired difference to `baseline` and half its interval; None for the baseline itself
    baseline what the gains are over, for the axis
    """

    title: str
    methods: Sequence[str]
    values: Sequence[Sequence[float]]
    means: Sequence[Bar | None]
    gains: Sequence[Bar | None]
    baseline: str = "the plain student"


def draw_comparison(comparisons: Sequence[Comparison], output: Path, metric: str) -> Path:
    """Draw a row of two panels for each comparison into one PNG; returns its path. ValueError without any."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not comparisons:
        raise ValueError("nothing to compare")
    heights = [1.15 + 0.3 * len(c.methods) for c in comparisons]
    figure = Figure(figsize=(11, sum(heights) + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    with rc_context({"text.parse_math": False}):  # a title may hold a $
        panels = figure.subplots(len(comparisons), 2, squeeze=False, gridspec_kw={"height_ratios": heights})
        for (left, right), shown in zip(panels, comparisons, strict=True):
            _draw_row(left, right, shown, metric)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    return output


def _draw_row(left: Any, right: Any, shown: Comparison, metric: str) -> None:
    places = range(len(shown.methods))
    for place, values in zip(places, shown.values, strict=True):
        left.plot(values, [place] * len(values), "o", color="0.65", markersize=4, zorder=1)
    for panel, bars, color in ((left, shown.means, MEAN), (right, shown.gains, GAIN)):
        for place, bar in zip(places, bars, strict=True):
            if bar is not None:
                panel.errorbar(bar[0], place, xerr=bar[1] or None, fmt="D", color=color, capsize=4, markersize=5)
        panel.set_yticks(list(places), shown.methods if panel is left else [""] * len(shown.methods))
        panel.set_ylim(len(shown.methods) - 0.5, -0.5)
        panel.grid(True, axis="x", alpha=0.3)
    right.axvline(0, color="0.3", linewidth=1)
    left.set_title(shown.title, fontsize=9, loc="left")
    left.set_xlabel(f"{metric}: mean ± standard deviation", fontsize=8)
    right.set_xlabel(f"paired gain over {shown.baseline}: mean and 95 % interval", fontsize=8)
