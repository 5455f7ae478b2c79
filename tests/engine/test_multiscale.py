"""Sizes are a pure function of the iteration; boxes follow the pixels."""

from __future__ import annotations

import torch

from yoloxkd.engine.multiscale import INTERVAL, resize_batch, size_at
from yoloxkd.types import Batch, Targets


def test_sizes_hold_for_an_interval_and_cover_the_range() -> None:
    sizes = [size_at(i, imgsz=320, steps=(-3, 7), stride=32, seed=1) for i in range(3000)]
    assert all(len(set(sizes[i : i + INTERVAL])) == 1 for i in range(0, 3000, INTERVAL))
    assert set(sizes) == set(range(224, 545, 32))
    assert sizes == [size_at(i, imgsz=320, steps=(-3, 7), stride=32, seed=1) for i in range(3000)]
    assert sizes != [size_at(i, imgsz=320, steps=(-3, 7), stride=32, seed=2) for i in range(3000)]
    assert {size_at(i, imgsz=320, steps=(0, 0), stride=32, seed=1) for i in range(100)} == {320}
    assert min(size_at(i, imgsz=64, steps=(-5, 5), stride=32, seed=1) for i in range(1000)) == 64


def test_boxes_follow_the_pixels() -> None:
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 16:32, 8:40] = 200
    box = torch.tensor([[[8.0, 16.0, 40.0, 32.0]]])
    flags = torch.ones(1, 1, dtype=torch.bool)
    targets = Targets(box, torch.zeros(1, 1, dtype=torch.int64), flags, ~flags)
    batch = Batch(images, targets, torch.tensor([[0.0, 0.0, 64.0, 48.0]]))
    bigger = resize_batch(batch, 128)
    assert bigger.images.dtype == torch.uint8
    assert bigger.images.shape == (1, 3, 128, 128)
    x1, y1, x2, y2 = (int(v) for v in bigger.targets.boxes[0, 0])
    inside = bigger.images[0, 0, y1:y2, x1:x2].float()
    assert inside.mean() > 190
    assert bigger.images[0, 0].float().sum() - inside.sum() < 0.1 * inside.sum()
    assert bigger.content.tolist() == [[0.0, 0.0, 128.0, 96.0]]
    assert resize_batch(batch, 64) is batch
