"""Overview images of a data set: samples with boxes, and charts of counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yoloxkd.data.augment.placed_mask import placed_masks
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.stats import SIZES, SplitStats
from yoloxkd.drawing import draw_boxes, draw_masks, shortened
from yoloxkd.write_image import write_image

_PAPER, _GAP = 245, 8
_MOST_CLASSES = 40  # bars of the chart
_MOST_LETTERS = 30  # of a class name under its bar


def draw_samples(data: DetectionData, output: Path, count: int = 12, cell: int = 360, columns: int = 4) -> Path:
    """A sheet of images spread over the split, with boxes, masks where there are some, and class names; those to be ignored are named so.

    OSError: the file cannot be written. UserError: an image cannot be read.
    """
    indices = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).round().astype(int)).tolist()
    columns = min(columns, len(indices))
    rows = -(-len(indices) // columns)
    step = cell + _GAP
    sheet = np.full((rows * step + _GAP, columns * step + _GAP, 3), _PAPER, np.uint8)
    for number, index in enumerate(indices):
        image = _sample(data, index, cell)
        h, w = image.shape[:2]
        y = _GAP + number // columns * step + (cell - h) // 2
        x = _GAP + number % columns * step + (cell - w) // 2
        sheet[y : y + h, x : x + w] = image
    write_image(output, sheet)
    return output


def _sample(data: DetectionData, index: int, cell: int) -> np.ndarray:
    image = data.read(index)
    scale = cell / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    boxes, labels, crowd = data.annotations(index)
    if data.masks is not None:
        matrix = np.array([[size[0] / image.shape[1], 0.0, 0.0], [0.0, size[1] / image.shape[0], 0.0]])
        masks = np.zeros((len(boxes), size[1], size[0]), bool)
        whole = (0.0, 0.0, float(image.shape[1]), float(image.shape[0]))
        for painted, mask in zip(masks, placed_masks(data, index, matrix, whole), strict=True):
            mask.paint(painted)
        small = draw_masks(small, masks, labels)
    order = np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable")  # small boxes over large ones
    names = [data.names[k] + (" (ignore)" if c else "") for k, c in zip(labels[order], crowd[order], strict=True)]
    return draw_boxes(small, boxes[order] * scale, labels[order], names)


def draw_counts(splits: Sequence[SplitStats], output: Path) -> Path:
    """Charts of every split: boxes by class and size, boxes an image, sides of boxes, sizes of images."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 1 + 4.2 * len(splits)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    with rc_context({"text.parse_math": False}):  # a class may be called $x$
        rows = figure.subplots(len(splits), 4, squeeze=False, width_ratios=(2.2, 1, 1, 1))
        for panels, split in zip(rows, splits, strict=True):
            _classes(panels[0], split)
            _bars(panels[1], split.per_image, f"{split.split}: boxes an image")
            _bars(panels[2], split.sides, "side of a box / side of its image", (0.0, 1.0))
            panels[3].hexbin(split.sizes[:, 1], split.sizes[:, 0], gridsize=24, bins="log", mincnt=1, cmap="viridis")
            panels[3].set_title("images, width x height px", fontsize=10, loc="left")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    return output


def _classes(panel: Any, split: SplitStats) -> None:
    """Stacked bars, the most frequent classes first."""
    order = np.argsort(-split.by_class.sum(1), kind="stable")[:_MOST_CLASSES]
    base = np.zeros(len(order))
    for column, (size, color) in enumerate(zip(SIZES, ("#4c78a8", "#f58518", "#54a24b"), strict=True)):
        values = split.by_class[order, column]
        panel.bar(range(len(order)), values, bottom=base, color=color, label=size, width=0.8)
        base = base + values
    panel.set_xticks(
        range(len(order)),
        [shortened(split.names[k], _MOST_LETTERS) for k in order],
        rotation=90 if len(order) > 6 else 0,
        fontsize=8,
    )
    more = f", the {len(order)} most frequent of {len(split.names)}" if len(order) < len(split.names) else ""
    panel.set_title(f"{split.split}: boxes by class{more}", fontsize=10, loc="left")
    panel.legend(fontsize=8, framealpha=0.85)


def _bars(panel: Any, values: np.ndarray, title: str, limits: tuple[float, float] | None = None) -> None:
    panel.hist(values, bins=30, range=limits, color="#4c78a8")
    panel.set_title(title, fontsize=10, loc="left")
