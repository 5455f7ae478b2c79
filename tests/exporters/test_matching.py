"""What counts as the same detections, and what is excused."""

from __future__ import annotations

import numpy as np
import pytest

from yoloxkd.exporters.matching import Candidates, Comparison, Suppression, Tolerance, compare, overlaps
from yoloxkd.soft_masks import BoxMasks
from yoloxkd.types import Detections

SETTINGS = Suppression(conf=0.3, iou=0.65, max_det=10)
TOLERANCE = Tolerance(score=1e-3, iou=0.99)
BOXES = np.array([[0.0, 0, 100, 100], [200, 0, 300, 80], [10, 200, 60, 290]])
SCORES = np.array([0.9, 0.8, 0.6])
LABELS = np.array([0, 1, 0])
SIZE = (320, 320)


def detections(rows: list[int], **changes: np.ndarray) -> Detections:
    values = {"boxes": BOXES, "scores": SCORES, "labels": LABELS} | changes
    return Detections(*(values[k][rows].copy() for k in ("boxes", "scores", "labels")))


def result(model: Detections, file: Detections, settings: Suppression = SETTINGS) -> Comparison:
    scores = np.zeros((len(model), 2))
    scores[np.arange(len(model)), model.labels] = model.scores
    total = Comparison()
    compare(total, model, file, Candidates(model.boxes, scores, SIZE), settings, TOLERANCE)
    return total


def test_at_the_last_pair_of_a_full_level_rounding_may_choose_another() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    scores = np.array([[0.9], [0.6], [0.5995], [0.5]])
    candidates = Candidates(boxes, scores, SIZE, levels=(3, 1))

    def sides(mine: list[int], other: list[int], pairs_per_level: int | None) -> int:
        total = Comparison()
        both = [Detections(boxes[rows], scores[rows, 0], np.zeros(len(rows), int)) for rows in (mine, other)]
        settings = Suppression(conf=0.3, iou=0.65, max_det=10, pairs_per_level=pairs_per_level)
        compare(total, both[0], both[1], candidates, settings, TOLERANCE)
        return total.unmatched

    assert sides([0, 1, 3], [0, 2, 3], 2) == 0  # either may be the second pair of the first level
    assert sides([0, 1, 3], [0, 2, 3], None) == 2
    assert sides([0, 1, 3], [1, 2, 3], 2) == 1  # the first is not near the cut
    assert sides([0, 1, 3], [0, 1], 2) == 1  # the second level is not full


def test_the_same_in_another_order_is_the_same() -> None:
    total = result(detections([0, 1, 2]), detections([2, 0, 1]))
    assert total == Comparison(detections=3)


def test_differences_within_the_tolerance_are_measured() -> None:
    total = result(detections([0, 1, 2]), detections([0, 1, 2], scores=SCORES + 5e-4, boxes=BOXES + [0, 0, 0.1, 0]))
    assert (total.unmatched, total.borderline) == (0, 0)
    assert total.max_score_difference == pytest.approx(5e-4)
    assert total.max_box_difference == pytest.approx(0.1)
    assert 0.99 < total.min_iou < 1


@pytest.mark.parametrize(
    "file",
    [
        detections([0, 1]),
        detections([0, 1, 2, 2]),
        detections([0, 1, 2], scores=SCORES - 2e-3),
        detections([0, 1, 2], boxes=BOXES * 1.02),
        detections([0, 1, 2], labels=1 - LABELS),
        detections([]),
    ],
    ids=["lost", "twice", "scores", "boxes", "labels", "all lost"],
)
def test_real_differences_are_not_excused(file: Detections) -> None:
    assert result(detections([0, 1, 2]), file).unmatched > 0


def test_a_score_at_the_threshold_may_be_missing_on_either_side() -> None:
    edge = detections([0, 1, 2], scores=np.array([0.9, 0.8, 0.3005]))
    short = detections([0, 1])
    for total in (result(edge, short), result(short, edge)):
        assert (total.unmatched, total.borderline) == (0, 1)


def test_a_score_at_the_end_of_a_full_list_may_be_missing() -> None:
    model = detections([0, 1, 2], scores=np.array([0.9, 0.6004, 0.6]))
    file = detections([0, 2], scores=np.array([0.9, 0.6004, 0.6]))
    assert result(model, file, Suppression(0.3, 0.65, 2)).unmatched == 0
    assert result(model, file, Suppression(0.3, 0.65, 3)).unmatched == 1


def test_an_overlap_at_the_nms_threshold_decides_by_rounding() -> None:
    boxes = np.array([[0.0, 0, 100, 100], [0, 0, 100, 65], [0, 0, 100, 60]])
    same = np.zeros(3, dtype=int)
    whole = detections([0, 1], boxes=boxes, labels=same)
    assert overlaps(boxes[:1], boxes, SIZE)[0].tolist() == pytest.approx([1, 0.65, 0.6])
    total = result(whole, detections([0], boxes=boxes, labels=same))
    assert (total.unmatched, total.borderline) == (0, 1)
    other = result(detections([0, 2], boxes=boxes, labels=same), detections([0], boxes=boxes, labels=same))
    assert other.unmatched == 1


def test_boxes_are_the_same_when_what_the_image_shows_of_them_is() -> None:
    thin, moved = [100.0001, -3e9, 100.0005, 3e9], [100.0006, -3.0001e9, 100.001, 3e9]
    assert overlaps(np.array([thin]), np.array([moved]), SIZE)[0, 0] == 1.0
    inside = [100.02, -3e9, 100.0204, 3e9]
    assert overlaps(np.array([thin]), np.array([inside]), SIZE)[0, 0] == 0.0
    assert overlaps(np.array([[0.0, 0, 4, 4]]), np.array([[0.0, 0, 4.02, 4]]), SIZE)[0, 0] < 1.0


def test_a_tie_in_the_order_of_nms_is_excused_only_when_the_model_has_the_other_choice() -> None:
    boxes = np.array([[0.0, 0, 100, 100], [0, 0, 100, 80]])
    scores, labels = np.array([0.9, 0.8996]), np.zeros(2, int)
    model = Detections(boxes[:1], scores[:1], labels[:1])
    file = Detections(boxes[1:], scores[1:], labels[1:])
    for known, unmatched in ((boxes, 0), (boxes[:1], 1)):
        total = Comparison()
        compare(total, model, file, Candidates(known, scores[: len(known), None], SIZE), SETTINGS, TOLERANCE)
        assert total.unmatched == unmatched
        assert total.borderline == (0 if unmatched else 2)


def test_a_tie_of_two_classes_is_excused_and_a_wrong_class_is_not() -> None:
    box, score = BOXES[:1], np.array([0.7])
    model, file = Detections(box, score, np.array([0])), Detections(box, score, np.array([1]))
    for second, unmatched in ((0.6995, 0), (0.4, 2)):
        total = Comparison()
        compare(total, model, file, Candidates(box, np.array([[0.7, second]]), SIZE), SETTINGS, TOLERANCE)
        assert total.unmatched == unmatched


def test_numbers_that_are_none_are_not_the_same() -> None:
    broken = detections([0, 1, 2], scores=np.full(3, np.nan), boxes=np.full((3, 4), np.nan))
    assert result(detections([0, 1, 2]), broken).unmatched > 0


def test_another_mask_in_the_same_box_is_not_excused() -> None:
    """The model has that box among its candidates, of course: it is its own."""
    left, right = np.zeros((2, 3, 8, 8))
    left[:, :, :4], right[:, :, 4:] = 1, 1
    model = detections([0, 1, 2])
    model.soft_masks = BoxMasks(left)
    for masks, unmatched in ((left, 0), (right, 3)):
        file = detections([0, 1, 2])
        file.soft_masks = BoxMasks(masks)
        total = result(model, file)
        assert (total.unmatched, total.borderline) == (unmatched, 0)
        assert total.min_mask_iou == (0 if unmatched else 1)
