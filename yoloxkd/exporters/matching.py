"""Compare two lists of detections of one image, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from yoloxkd.soft_masks import THRESHOLD, BoxMasks, SoftMasks, pasted
from yoloxkd.types import Detections, ImageMeta

_NEAR = 1e-3  # how close to the NMS IoU threshold a pair must be for rounding to decide it


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a file may be from its model.

    score, iou    of every detection: |difference| at most `score`, overlap above `iou`
    unmatched     share of detections that may have no counterpart within these
    ap            largest difference of the AP (0 to 1); None: not measured
    correlation   least correlation of the scores of the best locations; then single locations are not judged
    """

    score: float
    iou: float
    unmatched: float = 0.0
    ap: float | None = None
    correlation: float | None = None


@dataclass(slots=True)
class Suppression:
    """The settings both sides were made with; `pairs_per_level` as in `DetectorSpec`."""

    conf: float
    iou: float
    max_det: int
    pairs_per_level: int | None = None


@dataclass(slots=True)
class Candidates:
    """What the model could have detected in one image of `size` (H, W) px: boxes (A, 4), scores (A, K).

    levels  how many of the A locations each feature level has
    """

    boxes: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
    levels: tuple[int, ...] = ()

    def cut_scores(self, pairs_per_level: int) -> np.ndarray:
        """(A,) the lowest score of a pair of each location's level that goes into NMS; -1 where all pairs do."""
        lowest = np.full(len(self.scores), -1.0)
        start = 0
        for size in self.levels:
            pairs = self.scores[start : start + size].ravel()
            if pairs_per_level < pairs.size:
                lowest[start : start + size] = np.partition(pairs, -pairs_per_level)[-pairs_per_level]
            start += size
        return lowest


@dataclass(slots=True)
class Comparison:
    """Sums over images.

    detections   of the model
    borderline   detections of either side that differ because rounding decided, see `compare`
    unmatched    detections of either side without a counterpart within the tolerance, not borderline
    max_score_difference, min_iou, max_box_difference (px)   of pairs, in and outside the tolerance
    min_mask_iou   likewise, in the raster of the boxes; None: there are no masks
    """

    detections: int = 0
    borderline: int = 0
    unmatched: int = 0
    max_score_difference: float = 0.0
    min_iou: float = 1.0
    max_box_difference: float = 0.0
    min_mask_iou: float | None = None


def overlaps(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """IoU of boxes (n, 4) and (m, 4) -> (n, m), float64; 1 where the corners agree to 0.01 px within the image.

    size (H, W) px of the image. A network that has learnt little gives boxes of a billion pixels, whose last digits are
    larger than an image; what of a box lies in the image is all that anybody sees of it.
    """
    a, b = a.astype(np.float64)[:, None], b.astype(np.float64)[None]
    limit = np.array([size[1], size[0], size[1], size[0]], np.float64)
    distance = np.abs(np.clip(a, 0, limit) - np.clip(b, 0, limit)).max(axis=-1)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    inter = sides[..., 0] * sides[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    iou = inter / np.maximum(area_a + area_b - inter, 1e-12)
    same: np.ndarray = np.where(distance < 0.01, 1.0, iou)
    return same


def compare(
    total: Comparison,
    model: Detections,
    file: Detections,
    candidates: Candidates,
    settings: Suppression,
    tolerance: Tolerance,
) -> None:
    """Add one image to `total`.

    Detections are paired one to one, best first, by class and largest IoU (at least 0.5). Whatever cannot be
    paired, or is a pair outside the tolerance, is excused as borderline in these cases, and in no other:
    * its score is within `tolerance.score` of the confidence threshold, of the last score of a full list, or of the last
      pair of its level that goes into NMS: it may be absent on the other side;
    * it overlaps a detection of its class on the other side by the NMS threshold, to within 0.001: rounding decides
      whether it is suppressed;
    * model and file chose different ones of two candidates that overlap by more than the NMS threshold and whose scores
      are within `tolerance.score` of each other (the order of NMS, or the class, was a tie), and the model itself has
      the file's choice among its candidates, with that score, and, where only the best class of a location counts, as
      good as its best class there.
    """
    total.detections += len(model)
    iou = overlaps(model.boxes, file.boxes, candidates.size)
    pairs = _pairs(iou, model.labels, file.labels)
    odd_model = set(range(len(model))) - {i for i, _ in pairs}
    odd_file = set(range(len(file))) - {j for _, j in pairs}
    for i, j in pairs:
        difference = abs(float(model.scores[i]) - float(file.scores[j]))
        shared = mask_overlap(model.soft_masks, i, file.soft_masks, j, tolerance.score)
        same = difference <= tolerance.score and iou[i, j] > tolerance.iou
        if not same and _is_tie(model, i, file, j, iou, candidates, settings, tolerance):
            total.borderline += 2
            continue
        total.unmatched += not (same and shared > tolerance.iou)
        total.max_score_difference = max(total.max_score_difference, difference)
        total.min_iou = min(total.min_iou, float(iou[i, j]))
        if model.soft_masks is not None:
            total.min_mask_iou = min(shared, 1.0 if total.min_mask_iou is None else total.min_mask_iou)
        total.max_box_difference = max(total.max_box_difference, float(np.abs(model.boxes[i] - file.boxes[j]).max()))
    for i in sorted(odd_model):
        ties = [j for j in sorted(odd_file) if _is_tie(model, i, file, j, iou, candidates, settings, tolerance)]
        if ties:
            odd_model.discard(i)
            odd_file.discard(ties[0])
            total.borderline += 2
    for odd, side, other, table in ((odd_model, model, file, iou), (odd_file, file, model, iou.T)):
        for i in odd:
            excused = _at_threshold(side, i, other, table, settings, tolerance)
            excused = excused or _at_cut(side, i, candidates, settings, tolerance)
            total.borderline += excused
            total.unmatched += not excused


@dataclass(frozen=True, slots=True)
class PrintedMasks:
    """What a program printed of one image's objects, beside the model's masks put into that image.

    Attributes:
        masks: (n, h, w) bool of the image
        boxes: (m, 4) px of the image, of the model's objects
    """

    masks: np.ndarray
    boxes: np.ndarray

    def __getitem__(self, rows: Any) -> PrintedMasks:
        return PrintedMasks(self.masks[rows], self.boxes)

    def in_image(self, boxes: np.ndarray, meta: ImageMeta) -> tuple[np.ndarray, np.ndarray]:
        """See `SoftMasks`."""
        return boxes, self.masks

    def overlap(self, j: int, model: BoxMasks, i: int, slack: float) -> float:
        """IoU of the mask j with the model's mask i, without pixels whose probability is within `slack` of the threshold."""
        printed = self.masks[j]
        rows, columns, values = pasted(model.probability[i], self.boxes[i], *printed.shape)
        probability = np.zeros(printed.shape)
        probability[rows, columns] = values
        return _overlap(probability, printed, slack)


def mask_overlap(model: SoftMasks | None, i: int, file: SoftMasks | None, j: int, slack: float) -> float:
    """IoU of a mask of either side in the raster of its box, without cells within `slack` of the threshold; 1: there are no masks."""
    if model is None and file is None:
        return 1.0
    if isinstance(model, BoxMasks) and isinstance(file, PrintedMasks):
        return file.overlap(j, model, i, slack)
    if not isinstance(model, BoxMasks) or not isinstance(file, BoxMasks):
        return 0.0
    return _overlap(model.probability[i], file.probability[j] >= THRESHOLD, slack)


def _overlap(probability: np.ndarray, mask: np.ndarray, slack: float) -> float:
    """IoU of what a probability and a bool mask of its shape hold, without places within `slack` of the threshold."""
    sure = np.abs(probability - THRESHOLD) > slack
    inside, other = (probability >= THRESHOLD) & sure, mask & sure
    either = (inside | other).sum()
    return float((inside & other).sum() / either) if either else 1.0


def _pairs(iou: np.ndarray, labels_a: np.ndarray, labels_b: np.ndarray) -> list[tuple[int, int]]:
    free = (labels_a[:, None] == labels_b[None]) & (iou >= 0.5)
    pairs = []
    for i in range(len(labels_a)):
        if free[i].any():
            j = int(np.where(free[i], iou[i], -1.0).argmax())
            pairs.append((i, j))
            free[:, j] = False
    return pairs


def _at_threshold(
    side: Detections, i: int, other: Detections, iou: np.ndarray, settings: Suppression, tolerance: Tolerance
) -> bool:
    score = float(side.scores[i])
    if score <= settings.conf + tolerance.score:
        return True
    if len(other) == settings.max_det and score <= float(other.scores[-1]) + tolerance.score:
        return True
    of_class = other.labels == side.labels[i]
    return bool((of_class & (np.abs(iou[i] - settings.iou) <= _NEAR)).any())


def _at_cut(side: Detections, i: int, candidates: Candidates, settings: Suppression, tolerance: Tolerance) -> bool:
    """Whether a detection is about the last pair that its level sends into NMS: the other side may have sent another."""
    if settings.pairs_per_level is None:
        return False
    score = float(side.scores[i])
    alike = overlaps(side.boxes[i : i + 1], candidates.boxes, candidates.size)[0] > tolerance.iou
    alike &= np.abs(candidates.scores[:, int(side.labels[i])] - score) <= tolerance.score
    return bool((alike & (score <= candidates.cut_scores(settings.pairs_per_level) + tolerance.score)).any())


def _is_tie(
    model: Detections,
    i: int,
    file: Detections,
    j: int,
    iou: np.ndarray,
    candidates: Candidates,
    settings: Suppression,
    tolerance: Tolerance,
) -> bool:
    """Whether the file's detection j is a choice the model could as well have made instead of its detection i."""
    score, label = float(file.scores[j]), int(file.labels[j])
    if abs(float(model.scores[i]) - score) > tolerance.score or iou[i, j] < settings.iou - _NEAR:
        return False
    alike = overlaps(file.boxes[j : j + 1], candidates.boxes, candidates.size)[0] > tolerance.iou
    of_class = candidates.scores[:, label]
    if settings.pairs_per_level is None:
        alike &= of_class >= candidates.scores.max(axis=1) - tolerance.score
    return bool((alike & (np.abs(of_class - score) <= tolerance.score)).any())
