"""Post-processing: the rule, its edges, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yoloxkd.ops.nms import class_aware_nms, postprocess


def scene(seed: int, images: int = 2, locations: int = 60, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes, some left of and above the image, and scores with ties."""
    g = torch.Generator().manual_seed(seed)
    center = torch.rand(images, locations, 2, generator=g) * 60 - 10
    size = torch.rand(images, locations, 2, generator=g) * 40 + 5
    scores = (torch.rand(images, locations, classes, generator=g) * 20).round() / 20
    return torch.cat([center - size / 2, center + size / 2], dim=2), scores


def plain_rule(boxes: torch.Tensor, scores: torch.Tensor, conf: float, iou: float) -> list[tuple[int, int]]:
    """Locations and classes that stay, by the definition, one box at a time."""
    best, label = scores.max(1)
    corners = boxes.tolist()
    kept: list[tuple[int, int]] = []
    for i in sorted(range(len(best)), key=lambda i: (-float(best[i]), i)):
        if best[i] < conf:
            continue
        for j, other in kept:
            a, b = corners[i], corners[j]
            inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
            if other == int(label[i]) and inter / union > iou:
                break
        else:
            kept.append((i, int(label[i])))
    return kept


@given(seed=st.integers(0, 10_000), iou=st.floats(0.2, 0.9))
@settings(max_examples=20, deadline=None)
def test_equals_the_plain_rule(seed: int, iou: float) -> None:
    boxes, scores = scene(seed)
    found = postprocess(boxes, scores, conf=0.3, iou=iou, max_det=1000)
    for image, (b, s, k) in enumerate(found):
        kept = plain_rule(boxes[image], scores[image], 0.3, iou)
        rows = [i for i, _ in kept]
        assert torch.equal(b, boxes[image, rows])
        assert torch.equal(s, scores[image, rows].max(1).values)
        assert k.tolist() == [label for _, label in kept]


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_an_image_does_not_depend_on_its_batch_and_max_det_cuts_the_tail(seed: int) -> None:
    boxes, scores = scene(seed)
    both = postprocess(boxes, scores, conf=0.1, iou=0.6, max_det=100)
    alone = postprocess(boxes[1:], scores[1:], conf=0.1, iou=0.6, max_det=5)
    for whole, few in zip(both[1], alone[0], strict=True):
        assert torch.equal(whole[:5], few)


def test_the_threshold_is_inclusive() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
    scores = torch.tensor([[[0.25, 0.0], [0.24999, 0.1]]])
    found = postprocess(boxes, scores, conf=0.25, iou=0.5, max_det=10)
    assert found[0][1].tolist() == [0.25]


def test_nothing_found_has_the_shapes_of_something() -> None:
    found = postprocess(torch.zeros(2, 5, 4), torch.zeros(2, 5, 3), conf=0.1, iou=0.5, max_det=10)
    assert [tuple(t.shape) for t in found[1]] == [(0, 4), (0,), (0,)]
    assert found[0][2].dtype == torch.int64


def test_classes_are_kept_apart_unless_agnostic() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
    scores = torch.tensor([[[0.9, 0.0], [0.0, 0.8]]])
    assert len(postprocess(boxes, scores, conf=0.1, iou=0.5, max_det=10)[0][1]) == 2
    agnostic = postprocess(boxes, scores, conf=0.1, iou=0.5, max_det=10, agnostic=True)[0]
    assert agnostic[2].tolist() == [0]


def test_boxes_outside_the_image_do_not_reach_another_class() -> None:
    # planes moved apart by the largest coordinate alone would put the second box on top of the first
    boxes = torch.tensor([[390.0, 390, 420, 420], [-31, -31, -1, -1]])
    kept = class_aware_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5)
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("far", [2e31, float("inf"), float("nan")])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_box_of_a_network_that_diverged_changes_nothing_for_the_others(far: float, seed: int) -> None:
    boxes, scores = (t[0] for t in scene(seed, images=1))
    best, labels = scores.max(1)
    alone = class_aware_nms(boxes, best, labels, 0.5)
    outlier = torch.tensor([[-far, -far, far, far]])
    scored = torch.cat([best, torch.tensor([0.5])])
    kept = class_aware_nms(torch.cat([boxes, outlier]), scored, torch.cat([labels, torch.tensor([3])]), 0.5)
    assert set(kept.tolist()) == {len(boxes), *alone.tolist()}
    assert kept[kept != len(boxes)].tolist() == alone.tolist()
    assert scored[kept].diff().le(0).all()
