"""The valuable region of LD against a reading of its definition, box by box and anchor by anchor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from yoloxkd.nn.assigners.atss import atss_match, near_misses
from yoloxkd.ops.points import grid_of
from yoloxkd.types import Targets

SIZES = ((12, 16), (6, 8), (3, 4))
LEVELS = (8, 16, 32)


def scene(images: int, rows: int, seed: int) -> Targets:
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(images, rows, 2, generator=g, dtype=torch.float64) * 80
    side = 6 + torch.rand(images, rows, 2, generator=g, dtype=torch.float64) * 70
    mask = torch.rand(images, rows, generator=g) < 0.8
    mask[:, 0] = True
    labels = torch.zeros(images, rows, dtype=torch.int64)
    return Targets(torch.cat([low, low + side], -1), labels, mask, torch.zeros_like(mask))


def overlap(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and DIoU of two boxes."""
    w, h = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    sizes = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    iou = w * h / (sum(sizes) - w * h)
    apart = sum(((a[i] + a[i + 2] - b[i] - b[i + 2]) / 2) ** 2 for i in (0, 1))
    hull = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
    return iou, iou - apart / hull


def plain(points: Tensor, strides: Tensor, targets: Targets, low: float) -> Tensor:
    out = torch.zeros(targets.mask.shape[0], len(points), dtype=torch.float64)
    anchors = [
        [x - 4 * s, y - 4 * s, x + 4 * s, y + 4 * s]
        for (x, y), s in zip(points.tolist(), strides.tolist(), strict=True)
    ]
    for b, g in targets.mask.nonzero().tolist():
        box = targets.boxes[b, g].tolist()
        center = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
        candidates: list[int] = []
        first = 0
        for h, w in SIZES:
            near = sorted(
                range(first, first + h * w),
                key=lambda i: sum((p - c) ** 2 for p, c in zip(points[i].tolist(), center, strict=True)),
            )
            candidates += near[:9]
            first += h * w
        found = torch.tensor([overlap(anchors[i], box)[0] for i in candidates], dtype=torch.float64)
        threshold = float(found.mean() + found.std())
        for i, anchor in enumerate(anchors):
            iou, distance = overlap(anchor, box)
            if low * threshold <= distance < threshold:
                out[b, i] = max(out[b, i], iou)
    return out


@pytest.mark.parametrize("low", [0.0, 0.25, 0.9])
def test_equals_a_plain_reading(low: float) -> None:
    grid = grid_of(SIZES, LEVELS, torch.device("cpu"), offset=0.0)
    targets = scene(2, 5, seed=3)
    expected = plain(grid.points.double(), grid.point_strides, targets, low)
    exact = replace(grid, points=grid.points.double())
    found = near_misses(exact, targets, low=low)
    torch.testing.assert_close(found, expected)
    assert (expected > 0).any()
    small = near_misses(exact, targets, low=low, budget=1)
    assert torch.equal(small, found)


def test_wider_with_a_lower_bound_and_apart_from_a_lone_boxs_positives() -> None:
    grid = grid_of(SIZES, LEVELS, torch.device("cpu"), offset=0.0)
    targets = scene(3, 1, seed=5)
    wide, narrow = (near_misses(grid, targets, low=low) > 0 for low in (0.1, 0.6))
    assert (wide & narrow).sum() == narrow.sum() < wide.sum()
    positive = atss_match(grid, targets).fg
    # a positive's overlap reaches the threshold; only its center's distance may pull it below
    assert (positive & ~wide).any()


def test_no_boxes_no_region() -> None:
    grid = grid_of(SIZES, LEVELS, torch.device("cpu"), offset=0.0)
    for rows in (0, 3):
        targets = scene(2, max(rows, 1), seed=1)
        none = torch.zeros(2, rows, dtype=torch.bool)
        targets = Targets(
            targets.boxes[:, :1].expand(-1, rows, -1), torch.zeros_like(none, dtype=torch.int64), none, none
        )
        assert not near_misses(grid, targets, low=0.25).any()
