"""Figures of chosen images as parts of the page, each with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yoloxkd.explain.attention import AttentionDistance, attention_distances, attention_maps, published_tau
from yoloxkd.explain.quality import XI, over_levels, quality_maps
from yoloxkd.explain.scene import Model, Scene, see
from yoloxkd.explain.weights import ForegroundWeights, distiller_maps, foreground_weights
from yoloxkd.viz.charts import bar_rows
from yoloxkd.viz.explain_page import ImageFigure, Panel, Panels, Part
from yoloxkd.viz.heat_maps import data_address, fitted, heat_map
from yoloxkd.viz.html_report import Chart

Numbers = list[dict[str, Any]]
_BOXES = "white: ground-truth boxes"
_BRIGHT = 0.99
"""Share of the cells of all models up to which the scale of attention goes: a softmax has single cells far above the rest."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """What is explained: models (the plain student first), their teacher, and images with everyone's output for each."""

    models: Sequence[Model]
    teacher: Model | None
    scenes: Sequence[Scene]
    outs: Sequence[dict[str, Any]]

    @classmethod
    def with_outputs(cls, models: Sequence[Model], teacher: Model | None, scenes: Sequence[Scene]) -> Subjects:
        """Run every model on every image."""
        everyone = [*([] if teacher is None else [teacher]), *models]
        return cls(models, teacher, scenes, [{m.name: see(m, scene) for m in everyone} for scene in scenes])

    @property
    def everyone(self) -> list[Model]:
        """The teacher, if there is one, then the models."""
        return [*([] if self.teacher is None else [self.teacher]), *self.models]


def panel(scene: Scene, cells: np.ndarray, high: float, caption: str, note: str = "") -> Panel:
    """A level's cells (h, w) over the image."""
    pixels = fitted(scene.pixels)
    height, width = pixels.shape[:2]
    boxes = scene.boxes * (width / scene.pixels.shape[1])
    return Panel(caption, data_address(heat_map(pixels, scene.on_image(cells, height, width), high, boxes)), note)


def attention_part(subjects: Subjects) -> tuple[Part, Numbers]:
    """FGD Figures 1 and 5: spatial attention as heat maps, channel attention as bars, and the distances to the teacher."""
    tau = published_tau(subjects.models[0].detector.family)
    images, numbers = [], []
    for scene, outs in zip(subjects.scenes, subjects.outs, strict=True):
        levels = {m.name: attention_maps(m, outs[m.name], tau) for m in subjects.everyone}
        teacher = [] if subjects.teacher is None else levels[subjects.teacher.name]
        apart = {m.name: {d.stride: d for d in attention_distances(levels[m.name], teacher)} for m in subjects.models}
        groups, charts = [], []
        for stride in sorted({level.stride for of_model in levels.values() for level in of_model}):
            here = {name: level for name, of_model in levels.items() for level in of_model if level.stride == stride}
            high = float(np.quantile(np.concatenate([level.spatial.ravel() for level in here.values()]), _BRIGHT))
            panels = [
                panel(scene, level.spatial, high, _role(subjects, name), _apart(apart.get(name, {}).get(stride)))
                for name, level in here.items()
            ]
            unit = "times the level's mean, and more"
            groups.append(Panels(f"Spatial attention, stride {stride}", panels, f"{high:.3g}", unit, _BOXES))
            bars = {_role(subjects, name): level.channels.tolist() for name, level in here.items()}
            svg = bar_rows(bars, x_label="channel", y_label="attention (mean 1)")
            charts.append(Chart(f"Channel attention, stride {stride}", svg))
        images.append(ImageFigure(scene.title, groups, charts))
        numbers += [
            {"image": scene.title, "model": name, "stride": d.stride} | _fields(d)
            for name, of_model in apart.items()
            for d in of_model.values()
        ]
    text = (
        "Where the neck's features are strong. Spatial attention is a softmax over the cells of the mean magnitude of all "
        f"channels, channel attention the same over the channels (FGD eq. 5 to 8, temperature {tau:g}). A student that has "
        "learnt from its teacher lights up where the teacher does: its L1 distance is smaller than the plain student's and its rank "
        "correlation higher."
    )
    note = (
        "Means over the images. L1: sum of the absolute differences over the cells or channels of a level, which FGD's loss "
        "multiplies by its weight gamma. Rank: Spearman's correlation, 1 for the same order. –: the two have other numbers of channels."
    )
    columns = ("model, stride", "spatial L1", "spatial rank", "channel L1", "channel rank")
    return Part(
        "Attention of teacher and student (FGD Figures 1 and 5)", text, columns, _mean_rows(numbers), note, (), images
    ), numbers


def quality_part(subjects: Subjects) -> tuple[Part, Numbers]:
    """PGD Figure 2: quality of the predictions of every model, the maximum over levels."""
    images, numbers = [], []
    for scene, outs in zip(subjects.scenes, subjects.outs, strict=True):
        panels = []
        for model in subjects.everyone:
            cells = over_levels(list(quality_maps(model, outs[model.name], scene).values()))
            panels.append(panel(scene, cells, 1.0, _role(subjects, model.name), f"best cell {cells.max():.2f}"))
            numbers.append({"image": scene.title, "model": model.name, "best": float(cells.max())})
        images.append(
            ImageFigure(scene.title, [Panels("Quality, maximum over levels", panels, "1", "quality", _BOXES)])
        )
    text = (
        "How good the prediction of each cell is for the object around it: class probability to the power "
        f"{1 - XI:.1f} times IoU to the power {XI:g} (PGD eq. 1), 1 at best, 0 outside all boxes. Few cells of an object are good, most "
        "often one region near its center."
    )
    return Part("Quality of the predictions (PGD Figure 2)", text, images=images), numbers


def weights_part(subjects: Subjects, teacher: Model) -> tuple[Part, Numbers]:
    """PGD Figure 1: what each rule would teach of the teacher's maps, and PGD's key regions level by level."""
    images: list[ImageFigure] = []
    numbers: Numbers = []
    for scene, outs in zip(subjects.scenes, subjects.outs, strict=True):
        foregrounds = foreground_weights(teacher, outs[teacher.name], scene)
        panels = [
            panel(scene, over_levels(list(w.levels.values())), 1.0, _rule(w.name), _cells_note(w)) for w in foregrounds
        ]
        key = next(w for w in foregrounds if w.name == "gauss")
        levels = [
            panel(scene, cells, 1.0, f"stride {stride}", f"{key.cells_per_object[stride]:.1f} cells an object")
            for stride, cells in key.levels.items()
        ]
        of = f"of {teacher.name}"
        groups = [
            Panels(f"Foreground weights {of}, maximum over levels", panels, "1", "weight", _BOXES),
            Panels(f"Key regions of PGD (gauss) {of}, level by level", levels, "1", "weight", _BOXES),
        ]
        images.append(ImageFigure(scene.title, groups))
        numbers += [
            {"image": scene.title, "rule": w.name, "cells": w.cells_per_object, "share_of_box": w.inside_share}
            for w in foregrounds
        ]
    text = (
        "Which cells of the teacher's maps a distiller teaches as foreground, and how strongly: the seven strategies of PGD's Table 5 "
        "(gauss is PGD itself), then FGFI, DeFeat and TADF. PGD takes the few cells from which the teacher predicts best, wherever "
        "they lie; the others follow the box."
    )
    strides = list(numbers[0]["cells"])
    columns = ("rule", "of the box's cells", *(f"stride {s}" for s in strides))
    note = "Means over the objects, then over the images: share of the cells inside an object's box that have a weight, and cells an object has on each level."
    return Part(
        "Foreground weights (PGD Figure 1)", text, columns, _rule_rows(numbers, strides), note, (), images
    ), numbers


def maps_part(subjects: Subjects, teacher: Model, methods: Sequence[str]) -> tuple[Part, Numbers]:
    """What distillers look at when they teach the first model."""
    student = subjects.models[0]
    images, numbers = [], []
    for scene, outs in zip(subjects.scenes, subjects.outs, strict=True):
        groups = []
        for method in methods:
            maps = distiller_maps(method, student, teacher, (outs[student.name], outs[teacher.name]), scene)
            panels = [
                panel(scene, cells, float(cells.max()), what, f"largest {cells.max():.3g}")
                for what, cells in maps.items()
            ]
            title = f"{method}: {teacher.name} teaches {student.name}"
            key = _BOXES if panels else "compares whole maps or predictions: it prefers no cells"
            groups.append(Panels(title, panels, "each map's largest weight" if panels else "", "", key))
            numbers += [
                {"image": scene.title, "method": method, "map": what, "largest": float(cells.max())}
                for what, cells in maps.items()
            ]
        images.append(ImageFigure(scene.title, groups))
    text = "The weights that a distillation method gives to the cells of this image, as it would in a training step of the first model."
    return Part("What a distiller looks at", text, images=images), numbers


def _role(subjects: Subjects, name: str) -> str:
    if subjects.teacher is not None and name == subjects.teacher.name:
        return f"{name} (teacher)"
    return name


def _rule(name: str) -> str:
    papers = {"fgfi": "FGFI", "defeat": "DeFeat", "tadf": "TADF", "gauss": "PGD: gauss"}
    return papers.get(name, f"PGD: {name}")


def _cells_note(weights: ForegroundWeights) -> str:
    return (
        f"{sum(weights.cells_per_object.values()):.0f} cells an object, {weights.inside_share:.0%} of those in its box"
    )


def _apart(distance: AttentionDistance | None) -> str:
    if distance is None:
        return ""
    return f"L1 {distance.spatial_l1:.4g}, rank {distance.spatial_rank:.2f}"


def _fields(distance: AttentionDistance) -> dict[str, float | None]:
    names = ("spatial_l1", "spatial_rank", "channel_l1", "channel_rank")
    values = [getattr(distance, name) for name in names]
    return {n: None if v is None or math.isnan(v) else v for n, v in zip(names, values, strict=True)}


def _mean(values: Sequence[float | None], form: str) -> str:
    there = [v for v in values if v is not None]
    return format(math.fsum(there) / len(there), form) if there else "–"


def _mean_rows(numbers: Numbers) -> list[list[str]]:
    """Distances of each model and stride, means over images."""
    keys = list(dict.fromkeys((row["model"], row["stride"]) for row in numbers))
    forms = {"spatial_l1": ".4g", "spatial_rank": ".2f", "channel_l1": ".4g", "channel_rank": ".2f"}
    out = []
    for model, stride in keys:
        rows = [row for row in numbers if (row["model"], row["stride"]) == (model, stride)]
        out.append([f"{model}, stride {stride}", *(_mean([row[n] for row in rows], form) for n, form in forms.items())])
    return out


def _rule_rows(numbers: Numbers, strides: Sequence[int]) -> list[list[str]]:
    out = []
    for rule in dict.fromkeys(row["rule"] for row in numbers):
        rows = [row for row in numbers if row["rule"] == rule]
        cells = [_mean([row["cells"][s] for row in rows], ".1f") for s in strides]
        out.append([_rule(rule), _mean([row["share_of_box"] for row in rows], ".0%"), *cells])
    return out
