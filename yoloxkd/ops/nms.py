"""NMS: from boxes and scores to the detections of each image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FAR = 1e6  # px; from 80 classes on planes this far apart float64 still gives a coordinate to 2e-8 px


def class_aware_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Greedy suppression within each class: which boxes stay.

    boxes (n, 4) xyxy, scores (n,), labels (n,) int64; a box falls when it overlaps a better one of its own class by
    more than `iou`. Returns indices (m,), best score first, the earlier row first among equals.

    Classes are kept apart by moving each to a plane of its own. The move is made in float64, where it changes no
    overlap, and by the whole extent of the boxes, so that boxes left of or above the image cannot reach the next plane.
    When a box is too large for that (a network that diverged or has learnt little gives 1e31 px, or infinity), each
    class is gone through by itself: that one box must not decide over all others.
    """
    from torchvision.ops import nms

    if boxes.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    exact = boxes.double()
    extent = exact.max() - exact.min() + 1.0
    if not extent <= _FAR:  # not `extent > _FAR`: it may be NaN
        rows = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        stays = torch.cat([of_class[nms(exact[of_class], scores[of_class].double(), iou)] for of_class in rows])
        stays = stays.sort().values
        return stays[scores[stays].sort(descending=True, stable=True).indices]
    kept: Tensor = nms(exact + (labels.double() * extent)[:, None], scores.double(), iou)
    return kept


def postprocess(
    boxes: Tensor, scores: Tensor, *, conf: float, iou: float, max_det: int, agnostic: bool = False
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rule by which YOLOX turns dense predictions into detections.

    boxes (B, A, 4) xyxy px, scores (B, A, K) 0 to 1. A location gives one detection, of its best class, when that score
    is at least `conf`; greedy NMS at IoU `iou` works within a class (over all classes when `agnostic`); at most
    `max_det` stay. Returns per image boxes (n, 4), scores (n,), labels (n,) int64, best score first.
    """
    best, labels = scores.max(dim=2)
    found = []
    for image_boxes, image_scores, image_labels in zip(boxes, best, labels, strict=True):
        rows = (image_scores >= conf).nonzero()[:, 0]
        b, s, k = image_boxes[rows], image_scores[rows], image_labels[rows]
        kept = class_aware_nms(b, s, torch.zeros_like(k) if agnostic else k, iou)[:max_det]
        found.append((b[kept], s[kept], k[kept]))
    return found


@dataclass(frozen=True, slots=True)
class NMS:
    """`postprocess` with its settings."""

    conf: float = 0.01
    iou: float = 0.65
    max_det: int = 300
    agnostic: bool = False

    def __call__(self, boxes: Tensor, scores: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """boxes (B, A, 4), scores (B, A, K) -> per image boxes (n, 4), scores (n,), labels (n,), best first."""
        return postprocess(boxes, scores, conf=self.conf, iou=self.iou, max_det=self.max_det, agnostic=self.agnostic)
