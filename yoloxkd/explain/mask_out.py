"""AP without the best predictions inside each box (PGD Figure 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from yoloxkd.config.recipe import ValSection
from yoloxkd.data.dataset import DetectionData
from yoloxkd.engine.evaluate import metrics_of
from yoloxkd.errors import UserError
from yoloxkd.explain.quality import XI, predictions
from yoloxkd.explain.scene import Model
from yoloxkd.kd.functional.importance import Predictions, quality
from yoloxkd.metrics.measure import overall
from yoloxkd.nn.assigners.inside import inside
from yoloxkd.ops.nms import NMS
from yoloxkd.types import Batch, DenseOutput, Detections, Targets

PERCENTS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
VAL = ValSection()
"""As `yoloxkd val` measures."""
REMOVED = -1.0
"""The score of a removed prediction: below every threshold."""


def check_percents(percents: Iterable[float]) -> tuple[float, ...]:
    """The grid of shares, each once and rising. UserError: one is not between 0 and 100, or there is none."""
    values = tuple(percents)
    for value in values:
        if not 0 <= value <= 100:
            raise UserError(f"{value:g} % of an object's predictions cannot be removed; give numbers from 0 to 100")
    if not values:
        raise UserError("there is no share of predictions to remove; give numbers from 0 to 100, such as 0,1,10")
    return tuple(sorted(set(values)))


@torch.no_grad()
def mask_out(model: Model, out: DenseOutput, targets: Targets, labels: Tensor, xi: float = XI) -> Tensor:
    """From which share on a cell is removed: (B, A) float64 in percent; infinite outside all boxes.

    Of the n cells strictly inside a box, over all levels, the best X % are removed: ceil(X n / 100) of them, by their quality
    for that box, ties to the lower index. So the cell of rank r (0: the best) goes where X > 100 r / n; of several boxes the
    least counts.

    Args:
        out: of B images; A cells over all levels
        targets: boxes (B, G, 4) px; labels (B, G) of the model's classes, -1: by localization alone
        xi: localization's part in the quality

    Example:
        >>> removed = mask_out(model, out, targets, labels) < 1.0  # the best 1 % of PGD Figure 3
    """
    model_predictions, grid = predictions(model, out), out.grid.of_cells()
    assert model_predictions.probability is not None
    assert model_predictions.boxes is not None
    limits = []
    for image, rows in enumerate(targets.mask):
        boxes, here = targets.boxes[image, rows][None], slice(image, image + 1)
        of_image = Predictions(
            model_predictions.points, model_predictions.probability[here], model_predictions.boxes[here]
        )
        within = inside(grid, boxes)[0]
        score = quality(of_image, boxes, labels[image, rows][None], (xi,))[0, 0]
        order = score.argsort(dim=1, descending=True, stable=True)
        # those inside first, for outside a quality may be higher, and inside it may be zero
        order = order.gather(1, (~within).gather(1, order).int().argsort(dim=1, stable=True))
        rank = order.argsort(dim=1).double()
        least = (100.0 * rank / within.sum(1, keepdim=True)).masked_fill(~within, torch.inf)
        limits.append(torch.cat([least, least.new_full((1, least.shape[1]), torch.inf)]).amin(0))
    return torch.stack(limits)


def mask_out_ap(
    model: Model, loader: Iterable[Batch], data: DetectionData, percents: Sequence[float] = PERCENTS, xi: float = XI
) -> list[dict[str, Any]]:
    """The metrics of a model without the best X % of its predictions inside each box, for each X: removed before NMS.

    Args:
        loader: batches of `data`, whose labels are in its order
        percents: X, 0 to 100
        xi: localization's part in the quality

    Returns:
        What an evaluation gives, for each X in the order given.

    Raises:
        UserError: an X beyond 0 to 100, a model that predicts at no fixed cells, or that knows no class of the data set.
    """
    check_percents(percents)
    model.check_tower("mask-out")
    classes, detector = model.classes(data.names), model.detector.eval()
    nms = NMS(VAL.conf, VAL.iou, VAL.max_det)
    detections_of_percents: list[dict[int, Detections]] = [{} for _ in percents]
    for batch in loader:
        batch = batch.to(next(detector.parameters()).device)
        with torch.no_grad():
            out = detector(batch.images)
            labels = classes.to(batch.targets.labels.device)[batch.targets.labels]
            limit = mask_out(model, out, batch.targets, labels, xi).repeat_interleave(out.grid.per_cell, 1)
            boxes, scores = detector.candidates(out)
            for percent, images in zip(percents, detections_of_percents, strict=True):
                remaining = scores.masked_fill((limit < percent)[..., None], REMOVED)
                detections = detector.after_nms(boxes, remaining, detector.level_sizes(out), nms)
                images |= {m.index: d.to_image(m) for m, d in zip(batch.meta, detections, strict=True)}
    return [metrics_of(images, list(detector.names), data, backend=VAL.backend) for images in detections_of_percents]


def first_metric(metrics: dict[str, Any]) -> tuple[str, float]:
    """The name and the value of the metric that comes first: AP."""
    return next(iter(overall(metrics).items()))
