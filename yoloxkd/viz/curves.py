"""Training curves of a run, from its results.csv."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yoloxkd.viz.charts import legend_name

_METRICS = ("AP", "AP50", "AP75", "AR100", "mask_AP", "MR", "JI")


def draw_curves(rows: Sequence[Mapping[str, str]], output: Path) -> Path:
    """Draw losses, metrics, learning rate and speed over the epochs into one PNG; returns its path.

    rows are those of a results.csv, as text, one an epoch: `epoch`, `lr`, `images_per_s`, `loss`, `loss/<term>` and
    metrics by their names; empty cells are gaps, and a metric of -1 (nothing to measure) is one too. ValueError
    without rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("no epochs to draw: results.csv has no rows")
    columns = {name: [_number(row.get(name)) for row in rows] for name in rows[-1]}
    epochs = columns["epoch"]
    losses = {k.removeprefix("loss/"): v for k, v in columns.items() if k == "loss" or k.startswith("loss/")}
    quality = {k: [x if x >= 0 else math.nan for x in columns[k]] for k in _METRICS if k in columns}

    figure = Figure(figsize=(11, 7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    scale = "log" if _spread(losses) > 100 else "linear"
    _panel(panels[0, 0], "loss terms, mean of an epoch", epochs, losses, scale)
    _panel(panels[0, 1], "validation", epochs, quality)
    _panel(panels[1, 0], "learning rate", epochs, {k: v for k, v in columns.items() if k == "lr"})
    _panel(panels[1, 1], "images a second", epochs, {k: v for k, v in columns.items() if k == "images_per_s"})
    for panel in panels[1]:
        panel.set_xlabel("epoch")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output


def _number(text: str | None) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan


def _spread(curves: dict[str, list[float]]) -> float:
    """Ratio of the largest value to the smallest; 1 where a logarithm would not do (values of zero or less)."""
    values = [v for curve in curves.values() for v in curve if math.isfinite(v)]
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def _panel(panel: Any, title: str, epochs: list[float], curves: dict[str, list[float]], scale: str = "linear") -> None:
    """One set of axes; a curve with gaps (epochs without an evaluation) is joined over them."""
    panel.set_title(title, fontsize=10, loc="left")
    for number, (name, curve) in enumerate(curves.items()):
        points = [(e, v) for e, v in zip(epochs, curve, strict=True) if math.isfinite(v)]
        if points:
            style = "-" if number < 10 else "--"
            panel.plot(
                *zip(*points, strict=True), style, marker=".", markersize=4, linewidth=1.3, label=legend_name(name)
            )
    if panel.lines:
        panel.set_yscale(scale)
        panel.legend(fontsize=8, ncols=1 + (len(panel.lines) > 6), framealpha=0.85)
    else:
        panel.text(0.5, 0.5, "no data", ha="center", va="center", transform=panel.transAxes, color="0.5")
    panel.grid(True, alpha=0.3)
