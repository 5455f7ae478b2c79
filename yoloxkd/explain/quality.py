"""Quality of a detector's predictions, cell by cell (PGD Figure 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from yoloxkd.explain.scene import Model, Scene
from yoloxkd.kd.functional.importance import Predictions, pgd_weights
from yoloxkd.types import DenseOutput

XI = 0.8
"""Localization's part in the quality (PGD section 3.1, Figure 2)."""


def predictions(model: Model, out: DenseOutput) -> Predictions:
    """What a dense detector predicts at each cell, as PGD's quality reads it."""
    return Predictions(out.grid.of_cells().points, model.detector.class_probability(out), out.boxes)


@torch.no_grad()
def quality_maps(model: Model, out: DenseOutput, scene: Scene, xi: float = XI) -> dict[int, np.ndarray]:
    """Largest quality over the objects at every cell, 0 outside all boxes: {stride: (h, w) float32, 0 to 1}. PGD eq. (1).

    Args:
        out: what `see(model, scene)` gave
        xi: localization's part. A class that the detector does not know counts by localization alone.

    Raises:
        UserError: the detector predicts at no fixed cells, or knows no class of the data set.
    """
    model.check_tower("quality")
    targets = scene.batch.targets
    labels = model.classes(scene.names).to(targets.labels.device)[targets.labels]
    model_predictions = predictions(model, out)
    weights = pgd_weights(model_predictions, targets.boxes, labels, targets.mask, xi=(xi,), strategy="quality")[0]
    levels = out.grid.of_cells().by_level(weights)
    return {
        stride: level[0, ..., 0].float().cpu().numpy() for stride, level in zip(out.grid.strides, levels, strict=True)
    }


def over_levels(maps: Sequence[np.ndarray]) -> np.ndarray:
    """The largest value over levels (h, w) of the same image, on the cells of the first, the finest."""
    h, w = maps[0].shape
    rows, columns = np.arange(h)[:, None], np.arange(w)[None]
    largest: np.ndarray = np.max([m[rows * m.shape[0] // h, columns * m.shape[1] // w] for m in maps], axis=0)
    return largest
