"""int8 sensitivity: each layer alone in int8, compared with the float32 graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from yoloxkd.exporters.int8 import Int8Quantizer
from yoloxkd.exporters.metadata import read_metadata

if TYPE_CHECKING:
    import onnx

PICTURES = 4
BEST = 100
"""Locations of an image that are compared: those the float32 graph scores highest."""
SHOWN = 15


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What int8 in these neighboring layers alone does to the best locations of a few images.

    score    mean difference of a location's best score (0 to 1)
    overlap  mean IoU that its box loses (0 to 1)
    """

    layers: tuple[str, ...]
    score: float
    overlap: float

    @property
    def total(self) -> float:
        return self.score + self.overlap


def layer_costs(
    maker: Int8Quantizer, model: onnx.ModelProto, images: Sequence[np.ndarray], seconds: float
) -> list[LayerCost]:
    """Costs of all layers, the worst first.

    model is the float32 graph the maker was made from. One layer is tried at a time; where that would take longer than
    `seconds`, as many neighbors together as keep within it.
    """
    sample = images[:: max(1, len(images) // PICTURES)][:PICTURES]
    expected = _outputs(model, sample)
    costs: list[LayerCost] = []
    untried = list(maker.layers)
    size = 1
    started = time.perf_counter()
    while untried:
        group, untried = untried[:size], untried[size:]
        others = set(maker.layers).difference(group)
        costs.append(_cost(tuple(group), expected, _outputs(maker.make(others), sample)))
        each = (time.perf_counter() - started) / len(costs)
        rest = max(seconds - (time.perf_counter() - started), each)
        size = max(1, int(np.ceil(len(untried) * each / rest)))
    return sorted(costs, key=lambda cost: -cost.total)


def describe_costs(costs: Sequence[LayerCost], in_float: Sequence[str]) -> str:
    """The report: a row a layer, the worst first, and whether it stays float."""
    names = [cost.layers[0] + (f" to {cost.layers[-1]}" if len(cost.layers) > 1 else "") for cost in costs[:SHOWN]]
    width = max(map(len, names), default=0)
    rows = [f"{'layer in int8 alone':{width}s}  score error  IoU lost  kept in"]
    for name, cost in zip(names, costs, strict=False):
        precision = "float32" if set(cost.layers) <= set(in_float) else "int8"
        rows.append(f"{name:{width}s}  {cost.score:11.5f}  {cost.overlap:12.5f}  {precision}")
    if len(costs) > SHOWN:
        rows.append(f"... and {len(costs) - SHOWN} more, none above {costs[SHOWN].total:.5f} in sum")
    return "\n".join(rows)


def _outputs(model: onnx.ModelProto, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """boxes (A, 4) and scores (A, K) of each image, before suppression."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    metadata = read_metadata({p.key: p.value for p in model.metadata_props}, Path("the graph"))
    names = [output.name for output in session.get_outputs()]
    predictions = []
    for image in images:
        outputs = dict(zip(names, session.run(names, {"images": image.astype(np.float32)}), strict=True))
        if metadata.head_maps is not None:
            size = (image.shape[2], image.shape[3])
            boxes, scores = metadata.head_maps.locations(outputs, size, len(metadata.names), Path("the graph"))
        else:
            prefix = "raw_" if "raw_boxes" in outputs else ""
            boxes, scores = outputs[f"{prefix}boxes"], outputs[f"{prefix}scores"]
        predictions.append((boxes[0], scores[0]))
    return predictions


def _cost(
    layers: tuple[str, ...],
    expected: Sequence[tuple[np.ndarray, np.ndarray]],
    predictions: Sequence[tuple[np.ndarray, np.ndarray]],
) -> LayerCost:
    score, overlap = [], []
    for (boxes, scores), (other_boxes, other_scores) in zip(expected, predictions, strict=True):
        best = scores.max(axis=1)
        rows = np.argsort(-best, kind="stable")[:BEST]
        classes = scores[rows].argmax(axis=1)
        score.append(np.abs(best[rows] - other_scores[rows, classes]).mean())
        overlap.append(1 - _paired_iou(boxes[rows], other_boxes[rows]).mean())
    return LayerCost(layers, float(np.mean(score)), float(np.mean(overlap)))


def _paired_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of row i of (n, 4) with row i of (n, 4)."""
    sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    inter = sides.prod(axis=1)
    areas = (a[:, 2:] - a[:, :2]).prod(axis=1) + (b[:, 2:] - b[:, :2]).prod(axis=1)
    iou: np.ndarray = inter / np.maximum(areas - inter, 1e-9)
    return iou
