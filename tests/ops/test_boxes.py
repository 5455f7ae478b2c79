"""Box conversions and IoU."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yoloxkd.ops.boxes import area, paired_iou, pairwise_iou, to_center, to_corners

BOX = st.tuples(*(st.integers(-50, 200) for _ in range(2)), *(st.integers(0, 80) for _ in range(2))).map(
    lambda v: [v[0], v[1], v[0] + v[2], v[1] + v[3]]
)
BOXES = st.lists(BOX, min_size=1, max_size=6).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


@settings(deadline=None)
@given(BOXES)
def test_conversions_are_inverse(boxes: torch.Tensor) -> None:
    assert torch.equal(to_corners(to_center(boxes)), boxes)


def cells(box: torch.Tensor) -> set[tuple[int, int]]:
    x1, y1, x2, y2 = (int(v) for v in box)
    return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}


@settings(deadline=None)
@given(BOXES, BOXES)
def test_overlap_counts_pixels(a: torch.Tensor, b: torch.Tensor) -> None:
    got = pairwise_iou(a, b)
    assert got.shape == (len(a), len(b))
    for i, box in enumerate(a):
        for j, other in enumerate(b):
            union = len(cells(box) | cells(other))
            expected = len(cells(box) & cells(other)) / union if union else 0.0
            assert abs(float(got[i, j]) - expected) < 1e-12


@settings(deadline=None)
@given(BOXES, BOXES)
def test_paired_overlap_is_the_diagonal(a: torch.Tensor, b: torch.Tensor) -> None:
    n = min(len(a), len(b))
    assert torch.equal(paired_iou(a[:n], b[:n]), pairwise_iou(a, b)[:n, :n].diagonal())


def test_overlaps_broadcast_over_batches() -> None:
    a, b = torch.rand(2, 3, 4), torch.rand(2, 5, 4)
    a, b = to_corners(a), to_corners(b)
    got = pairwise_iou(a, b)
    assert got.shape == (2, 3, 5)
    assert torch.equal(got[1], pairwise_iou(a[1], b[1]))
    assert torch.equal(paired_iou(a[:, :, None], b[:, None]), got)


def test_an_inverted_box_is_empty() -> None:
    inverted = torch.tensor([[5.0, 5.0, 3.0, 9.0]])
    assert float(area(inverted)) == 0
    assert float(pairwise_iou(inverted, torch.tensor([[0.0, 0.0, 10.0, 10.0]]))) == 0


def test_gradients_reach_both_boxes() -> None:
    a = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[3.0, 4.0, 14.0, 12.0], [1.0, 1.0, 5.0, 6.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pairwise_iou, (a, b))
    assert torch.autograd.gradcheck(paired_iou, (a, b))
