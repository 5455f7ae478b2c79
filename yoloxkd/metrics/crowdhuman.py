"""CrowdHuman metrics (Shao et al. 2018): AP, MR^-2 and JI of one class at IoU 0.5.

Before anything else boxes are clipped to the image: x1, y1 to its last pixel, x2, y2 to its border. Overlaps have 1e-6
added to their denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from yoloxkd.data.dataset import DetectionData
from yoloxkd.metrics.coco import COCODetections

CROWDHUMAN_NAMES = ("AP", "MR", "JI")
OVERLAP = 0.5
_EPS = 1e-6
_FALSE_ALARMS = (0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.000)
_THRESHOLDS = tuple(step / 10 for step in range(10))


@dataclass(slots=True)
class CrowdImage:
    """Boxes of one image, xyxy px, clipped by `crowd_image`.

    real        (G, 4) ground truth that has to be found
    ignored     (I, 4) regions and persons that need not be
    detections  (D, 4), best first, and their scores (D,)
    """

    real: np.ndarray
    ignored: np.ndarray
    detections: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class JaccardStep:
    """One threshold of the JI sweep: pairs, and the detections and ground truth that count, over all images."""

    threshold: float
    ji: float
    matched: int
    detections: int
    truths: int


@dataclass(frozen=True, slots=True)
class CrowdHumanResult:
    """ap, ji: larger is better; mr, the log-average miss rate: smaller is better. All -1 where nothing is to be found.

    true_positives, false_positives, ignored  how the detections count for AP and MR
    sweep                                     the ten steps that JI is the best of
    """

    ap: float
    mr: float
    ji: float
    true_positives: int
    false_positives: int
    ignored: int
    sweep: tuple[JaccardStep, ...]


def crowd_image(
    size: tuple[int, int], boxes: np.ndarray, ignore: np.ndarray, detections: np.ndarray, scores: np.ndarray
) -> CrowdImage:
    """size (H, W) px; boxes (n, 4) ground truth and ignore (n,); found (D, 4) and scores (D,) in any order; xyxy px."""
    order = np.argsort(-scores, kind="stable")
    boxes, detections = _clip(boxes, size), _clip(detections, size)[order]
    return CrowdImage(boxes[~ignore], boxes[ignore], detections, scores[order])


def _clip(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    limits = np.array([width - 1, height - 1, width, height], np.float64)
    return np.clip(np.asarray(boxes, np.float64).reshape(-1, 4), 0.0, limits)


def crowdhuman_result(images: list[CrowdImage]) -> CrowdHumanResult:
    """The three numbers over all images of the ground truth; an image without detections counts."""
    real = sum(len(image.real) for image in images)
    verdicts = [_verdicts(image) for image in images]
    verdict = np.concatenate([np.zeros(0, np.int8), *verdicts])
    scores = np.concatenate([np.zeros(0), *(image.scores for image in images)])
    counted = verdict != _IGNORED
    hits = (verdict[counted] == _HIT)[np.argsort(-scores[counted], kind="stable")]
    sweep = _sweep(images)
    return CrowdHumanResult(
        ap=_average_precision(hits, real) if real else -1.0,
        mr=_miss_rate(hits, real, len(images)) if real else -1.0,
        ji=max(step.ji for step in sweep) if real else -1.0,
        true_positives=int(hits.sum()),
        false_positives=int((~hits).sum()),
        ignored=int((~counted).sum()),
        sweep=sweep,
    )


_MISS, _HIT, _IGNORED = 0, 1, 2


def _verdicts(image: CrowdImage) -> np.ndarray:
    """(D,) what each detection is. By falling score each takes the free ground truth that it overlaps most."""
    overlap = _overlap(image.detections, image.real)
    absorbed = _share(image.detections, image.ignored) > OVERLAP
    out = np.where(absorbed, _IGNORED, _MISS).astype(np.int8)
    if overlap.shape[1]:
        for row in range(len(overlap)):
            best = int(overlap[row].argmax())
            if overlap[row, best] > OVERLAP:
                out[row] = _HIT
                overlap[:, best] = -1.0
    return out


def _average_precision(hits: np.ndarray, real: int) -> float:
    """Area under recall and precision by trapezoids between neighboring points, from the first on."""
    true_positives = np.cumsum(hits)
    recall, precision = true_positives / real, true_positives / np.arange(1, len(hits) + 1)
    return float(np.sum((recall[1:] - recall[:-1]) * (precision[1:] + precision[:-1]) / 2))


def _miss_rate(hits: np.ndarray, real: int, images: int) -> float:
    """Geometric mean of the miss rates where the false alarms per image first reach each of nine values."""
    if not len(hits):
        return 1.0
    alarms, miss = np.cumsum(~hits) / images, 1.0 - np.cumsum(hits) / real
    at = np.minimum(np.searchsorted(alarms, _FALSE_ALARMS), len(hits) - 1)
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(miss[at]).mean()))


def _sweep(images: list[CrowdImage]) -> tuple[JaccardStep, ...]:
    """Every threshold over all images; an image is matched again only when a threshold takes detections from it."""
    index = np.zeros(len(_THRESHOLDS))
    counts = np.zeros((len(_THRESHOLDS), 3), np.int64)
    measured = np.zeros(len(_THRESHOLDS), np.int64)
    for image in images:
        overlap = _overlap(image.detections, image.real)
        absorbed = _share(image.detections, image.ignored) > OVERLAP
        hidden = _share(image.real, image.ignored) > OVERLAP
        pairs_by_count: dict[int, tuple[int, int, int]] = {}
        for step, threshold in enumerate(_THRESHOLDS):
            count = int((image.scores > threshold).sum())
            if count not in pairs_by_count:
                pairs_by_count[count] = _pairs(overlap[:count], absorbed[:count], hidden)
            k, n, m = pairs_by_count[count]
            counts[step] += (k, n, m)
            if n or m:
                measured[step] += 1
                index[step] += k / (m + n - k + _EPS)
    means = index / np.maximum(measured, 1)
    return tuple(
        JaccardStep(t, float(ji), *map(int, row)) for t, ji, row in zip(_THRESHOLDS, means, counts, strict=True)
    )


def _pairs(overlap: np.ndarray, absorbed: np.ndarray, hidden: np.ndarray) -> tuple[int, int, int]:
    """Pairs of the matching with the greatest sum of IoUs, and the detections and ground truth that count."""
    good = overlap > OVERLAP
    detections, truths = good.any(1), good.any(0)
    weight = np.where(good, overlap, 0.0)[np.ix_(detections, truths)]
    rows, columns = linear_sum_assignment(weight, maximize=True)
    paired = weight[rows, columns] > 0
    used_detections, used_truths = np.flatnonzero(detections)[rows[paired]], np.flatnonzero(truths)[columns[paired]]
    unmatched_detections, unmatched_truths = ~absorbed, ~hidden
    unmatched_detections[used_detections], unmatched_truths[used_truths] = False, False
    k = int(paired.sum())
    return k, k + int(unmatched_detections.sum()), k + int(unmatched_truths.sum())


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4), (m, 4) -> area of each intersection (n, m)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.asarray((high - low).clip(0).prod(-1))


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(1))


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4), (m, 4) -> IoU (n, m)."""
    common = _common(a, b)
    return np.asarray(common / (_areas(a)[:, None] + _areas(b)[None] - common + _EPS))


def _share(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """(n,) the largest part of each box that lies inside one of the regions (m, 4)."""
    inside = _common(boxes, regions) / (_areas(boxes)[:, None] + _EPS)
    return np.asarray(inside.max(1, initial=0.0))


def crowdhuman_metrics(data: DetectionData, positions: list[int], detections: COCODetections) -> dict[str, Any]:
    """AP, MR and JI, and per_class {name: the same}, of detections on the images at `positions` of a data set.

    The ground truth is taken as annotated, where that is known to stick out of its image.
    """
    images = crowd_images(data, positions, detections)
    result = crowdhuman_result(images)
    numbers = {"AP": result.ap, "MR": result.mr, "JI": result.ji}
    return {**numbers, "per_class": {data.names[0]: numbers}}


def crowd_images(data: DetectionData, positions: list[int], detections: COCODetections) -> list[CrowdImage]:
    """The images at `positions` of a data set of one class, with what was detected on them (by position too)."""
    order = np.argsort(detections.image_id, kind="stable")
    image_ids = detections.image_id[order]
    boxes = data.boxes if data.unclipped is None else data.unclipped
    out = []
    for i in positions:
        rows = slice(data.offsets[i], data.offsets[i + 1])
        low, high = np.searchsorted(image_ids, i), np.searchsorted(image_ids, i, side="right")
        indices = order[low:high]
        truth, ignore = boxes[rows], data.crowd[rows]
        if data.unseen is not None:
            unseen = data.unseen[data.unseen[:, 0] == i, 1:]
            truth = np.concatenate([truth, unseen])
            ignore = np.concatenate([ignore, np.zeros(len(unseen), bool)])
        height, width = data.sizes[i].tolist()
        out.append(crowd_image((height, width), truth, ignore, detections.boxes[indices], detections.scores[indices]))
    return out
