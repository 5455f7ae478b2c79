"""int8 sensitivity: each layer alone in int8, compared with the float32 graph."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from yoloxkd.exporters.int8 import Locations

PICTURES = 4
BEST = 100
"""Locations of an image that are compared: those the float32 graph scores highest."""
SHOWN = 15


class Int8Maker(Protocol):
    """What makes int8 variants of one network: a graph, or a file.

    layers  names of the convolutions that may be int8
    """

    layers: list[str]

    def outputs(self, in_float: Collection[str] | None, images: Sequence[np.ndarray]) -> list[Locations]:
        """What the variant with these layers in float32 finds in each image; None: the float32 network."""
        ...


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


def layer_costs(maker: Int8Maker, images: Sequence[np.ndarray], seconds: float) -> list[LayerCost]:
    """Costs of all layers, the worst first.

    images are (1, 3, H, W) arrays, RGB 0..255, letterboxed; a few of them are looked at. One layer is tried at a time; where that would take longer than
    `seconds`, as many neighbors together as keep within it.
    """
    sample = images[:: max(1, len(images) // PICTURES)][:PICTURES]
    expected = maker.outputs(None, sample)
    costs: list[LayerCost] = []
    untried = list(maker.layers)
    size = 1
    started = time.perf_counter()
    while untried:
        group, untried = untried[:size], untried[size:]
        others = set(maker.layers).difference(group)
        costs.append(_cost(tuple(group), expected, maker.outputs(others, sample)))
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


def _cost(
    layers: tuple[str, ...],
    expected: Sequence[Locations],
    predictions: Sequence[Locations],
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
