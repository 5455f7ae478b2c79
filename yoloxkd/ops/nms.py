"""NMS: from boxes and scores to the detections of each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from yoloxkd.nms_defaults import CONF, IOU, MAX_DET

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
    survivors: Tensor = nms(exact + (labels.double() * extent)[:, None], scores.double(), iou)
    return survivors


def best_pairs(boxes: Tensor, scores: Tensor, levels: Sequence[int], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` best (location, class) pairs of each feature level, as RetinaNet chooses them (Lin et al. 2017, 4.1).

    boxes (B, A, 4), scores (B, A, K) 0 to 1, levels: how many of the A locations each level has, in their order
    -> boxes (B, P, 4), scores (B, P), labels (B, P) int64 with P = most x levels. A level's pairs are in the order of
    locations, and of classes within a location; a level with fewer pairs is filled up with scores of -1.
    """
    classes = scores.shape[2]
    where, best_scores, labels = [], [], []
    start = 0
    for size, level in zip(levels, scores.split(list(levels), dim=1), strict=True):
        pairs = level.flatten(1)
        number = pairs.shape[1]
        if not isinstance(number, int) or number < most:  # no `int` while a graph of free size is traced
            pairs = F.pad(pairs, (0, most), value=-1.0)
        best, at = pairs.topk(most, dim=1)
        at = torch.where(best >= 0, at, 0)
        at, order = at.sort(dim=1)
        best_scores.append(best.gather(1, order))
        where.append(at // classes + start)  # `//`: an exported `div` would go through float32, too coarse for LVIS
        labels.append(at % classes)
        start = start + size
    rows = torch.cat(where, dim=1)
    return (
        boxes.gather(1, rows.unsqueeze(-1).expand(-1, -1, 4)),
        torch.cat(best_scores, dim=1),
        torch.cat(labels, dim=1),
    )


def postprocess(
    boxes: Tensor,
    scores: Tensor,
    *,
    conf: float,
    iou: float,
    max_det: int,
    agnostic: bool = False,
    levels: Sequence[int] = (),
    pairs_per_level: int | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rule by which dense predictions become detections.

    boxes (B, A, 4) xyxy px, scores (B, A, K) 0 to 1. Without `pairs_per_level` a location gives one detection, of its
    best class (YOLOX's rule); with it one of every class, and of each level only that many of the best (location,
    class) pairs (the rule of detectors on an FPN), where `levels` says how many of the A locations each level has.
    A score must be at least `conf`; greedy NMS at IoU `iou` works within a class (over all classes when
    `agnostic`); at most `max_det` stay. Returns per image boxes (n, 4), scores (n,), labels (n,) int64, best score first.
    """
    if pairs_per_level is None:
        best, labels = scores.max(dim=2)
    else:
        boxes, best, labels = best_pairs(boxes, scores, levels, pairs_per_level)
    of_images = []
    for image_boxes, image_scores, image_labels in zip(boxes, best, labels, strict=True):
        rows = (image_scores >= conf).nonzero()[:, 0]
        b, s, k = image_boxes[rows], image_scores[rows], image_labels[rows]
        survivors = class_aware_nms(b, s, torch.zeros_like(k) if agnostic else k, iou)[:max_det]
        of_images.append((b[survivors], s[survivors], k[survivors]))
    return of_images


@dataclass(frozen=True, slots=True)
class NMS:
    """`postprocess` with its settings."""

    conf: float = CONF
    iou: float = IOU
    max_det: int = MAX_DET
    agnostic: bool = False

    def __call__(
        self, boxes: Tensor, scores: Tensor, levels: Sequence[int] = (), pairs_per_level: int | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """boxes (B, A, 4), scores (B, A, K) -> per image boxes (n, 4), scores (n,), labels (n,), best first."""
        return postprocess(
            boxes,
            scores,
            conf=self.conf,
            iou=self.iou,
            max_det=self.max_det,
            agnostic=self.agnostic,
            levels=levels,
            pairs_per_level=pairs_per_level,
        )
