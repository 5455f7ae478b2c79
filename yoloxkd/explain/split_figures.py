"""Figures of a whole split as parts of the page: where detections differ, and AP without the best predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.loader import eval_loader
from yoloxkd.drawing import shortened
from yoloxkd.explain.detections import BATCH, IOU, DetectionScore, detect_all, most_different, score_detections
from yoloxkd.explain.figures import Numbers
from yoloxkd.explain.mask_out import first_metric, mask_out_ap
from yoloxkd.explain.scene import Model
from yoloxkd.types import Detections, ImageSize
from yoloxkd.viz.charts import line_chart
from yoloxkd.viz.explain_page import ImageFigure, Panel, Panels, Part
from yoloxkd.viz.heat_maps import MOST_CAPTIONS, data_address, draw_scored, draw_truth, fitted
from yoloxkd.viz.html_report import Chart

_KEY = f"blue: ground truth; orange: right detection; black dashes: false detection; blue dots: missed object; numbers: score in percent, of the best {MOST_CAPTIONS} detections"


def detections_part(
    models: Sequence[Model],
    data: DetectionData,
    size: ImageSize,
    *,
    count: int,
    indices: Sequence[int] | None = None,
    conf: float = 0.3,
    device: torch.device | str = "cpu",
) -> tuple[Part, Numbers]:
    """PGD Figure 5: detections beside the ground truth, on the images `indices`, or on the `count` where models differ most."""
    detections = [detect_all(model, data, size, conf, device) for model in models]
    objects = [_objects(data, index) for index in range(len(data))]
    scores = [
        [score_detections(of_model[index], *objects[index]) for of_model in detections] for index in range(len(data))
    ]
    shown = list(indices) if indices is not None else most_different(scores, count)
    images = [
        _image(data, index, models, [of_model[index] for of_model in detections], scores[index], objects[index])
        for index in shown
    ]
    numbers: Numbers = [
        {
            "model": model.name,
            "right": sum(int(s[m].right.sum()) for s in scores),
            "false": sum(s[m].false for s in scores),
            "missed": sum(s[m].missed for s in scores),
            "images": len(data),
        }
        for m, model in enumerate(models)
    ]
    which = "the chosen images" if indices is not None else f"the images where the models differ most, of {len(data)}"
    text = (
        f"Detections with a score of at least {conf:g} on {which}. A detection is right when an object of its class overlaps it by an IoU of "
        f"at least {IOU:g}. Images are compared by the IoU of each object with its detection and by the number of false detections."
    )
    rows = [[row["model"], *(str(row[key]) for key in ("right", "false", "missed"))] for row in numbers]
    columns = ("model", "right", "false", "missed objects")
    title = "Detections beside the ground truth (PGD Figure 5)"
    note = f"Detections and objects in the {len(data)} images that were looked at."
    return Part(title, text, columns, rows, note, (), images), numbers


def _objects(data: DetectionData, index: int) -> tuple[np.ndarray, np.ndarray]:
    boxes, labels, crowd = data.annotations(index)
    return boxes[~crowd], labels[~crowd]


def _image(
    data: DetectionData,
    index: int,
    models: Sequence[Model],
    detections: Sequence[Detections],
    scores: Sequence[DetectionScore],
    objects: tuple[np.ndarray, np.ndarray],
) -> ImageFigure:
    image = data.read(index)
    pixels = fitted(image)
    scale = pixels.shape[1] / image.shape[1]
    boxes, labels = objects
    panels = [
        Panel(
            "ground truth",
            data_address(draw_truth(pixels, boxes * scale, [_short(data, k) for k in labels])),
            f"{len(boxes)} object{'' if len(boxes) == 1 else 's'}",
        )
    ]
    for model, of_model, score in zip(models, detections, scores, strict=True):
        captions = [f"{_short(data, k)} {100 * s:.0f}" for k, s in zip(of_model.labels, of_model.scores, strict=True)]
        drawing = draw_scored(pixels, of_model.boxes * scale, captions, score.right, boxes[score.iou == 0] * scale)
        note = f"{int(score.right.sum())} right, {score.false} false, {score.missed} missed"
        panels.append(Panel(model.name, data_address(drawing), note))
    return ImageFigure(Path(data.paths[index]).name, [Panels("Detections", panels, key=_KEY)])


def _short(data: DetectionData, label: int) -> str:
    return shortened(data.names[int(label)], 12)


def mask_out_part(
    models: Sequence[Model], data: DetectionData, size: ImageSize, percents: Sequence[float]
) -> tuple[Part, Numbers]:
    """PGD Figure 3: AP of each model without its best predictions, as a chart and a table."""
    curves, numbers, name = {}, [], "AP"
    for model in models:
        detector = model.detector
        loader = eval_loader(
            data, imgsz=size, batch=BATCH, multiple=detector.size_multiple, pad_value=detector.spec.input.pad_value
        )
        metrics = [first_metric(values) for values in mask_out_ap(model, loader, data, percents)]
        name = metrics[0][0]
        curves[model.name] = [value for _, value in metrics]
        numbers += [{"model": model.name, "percent": x, name: v} for x, (_, v) in zip(percents, metrics, strict=True)]
    chart = line_chart(
        percents,
        curves,
        x_label="best predictions removed inside each box (%)",
        y_label=f"{name} (0 to 1)",
        log=False,
        from_zero=True,
        ticks=percents,
    )
    text = (
        "What AP is left when the best X % of the predictions inside each ground-truth box are removed before NMS, best by their quality for "
        "that box. Of n cells inside a box ceil(X n / 100) go, so a small box loses its best one as soon as X is above 0. The steeper the "
        "fall, the fewer cells the detector lives on."
    )
    columns = ("model", *(f"{x:g} %" for x in percents))
    rows = [[model, *(f"{value:.3f}" for value in values)] for model, values in curves.items()]
    note = f"{name} on {len(data)} images, 0 to 1, by the share of predictions removed."
    title = "AP without the best predictions (PGD Figure 3)"
    return Part(title, text, columns, rows, note, [Chart(f"{name} by the share removed", chart)]), numbers
