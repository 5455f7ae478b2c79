"""Batches and targets are scaled, cut and moved as one value."""

from __future__ import annotations

from operator import itemgetter

import torch

from yoloxkd.types import Batch, ImageMeta, Targets


def targets_of(images: int, content: bool = True) -> Targets:
    """Two rows an image, the second an ignore region."""
    boxes = torch.arange(images * 8, dtype=torch.float32).view(images, 2, 4)
    mask = torch.tensor([[True, False]]).repeat(images, 1)
    area = torch.tensor([[0.0, 0.0, 64.0, 48.0]]).repeat(images, 1) if content else None
    return Targets(boxes, torch.arange(images * 2).view(images, 2), mask, ~mask, area)


def test_boxes_follow_the_pixels() -> None:
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[:, :, 16:32, 8:40] = 200
    box = torch.tensor([[[8.0, 16.0, 40.0, 32.0]]])
    flags = torch.ones(1, 1, dtype=torch.bool)
    content = torch.tensor([[0.0, 0.0, 64.0, 48.0]])
    targets = Targets(box, torch.zeros(1, 1, dtype=torch.int64), flags, ~flags, content)
    batch = Batch(images, targets, content, [ImageMeta(7, "a.jpg", 48, 64)], (1, 2))
    bigger = batch.resized(128)
    assert bigger.images.dtype == torch.uint8
    assert bigger.images.shape == (1, 3, 128, 128)
    x1, y1, x2, y2 = (int(v) for v in bigger.targets.boxes[0, 0])
    inside = bigger.images[0, 0, y1:y2, x1:x2].float()
    assert inside.mean() > 190
    assert bigger.images[0, 0].float().sum() - inside.sum() < 0.1 * inside.sum()
    assert bigger.content.tolist() == [[0.0, 0.0, 128.0, 96.0]]
    assert bigger.targets.content.tolist() == bigger.content.tolist()
    assert (bigger.meta, bigger.place) == (batch.meta, batch.place)
    assert batch.resized(64) is batch


def test_targets_are_scaled_in_both_directions() -> None:
    targets = targets_of(1)
    scaled = targets.scaled(2.0, 0.5)
    assert scaled.boxes.tolist() == [[[0.0, 0.5, 4.0, 1.5], [8.0, 2.5, 12.0, 3.5]]]
    assert scaled.content is not None
    assert scaled.content.tolist() == [[0.0, 0.0, 128.0, 24.0]]
    assert scaled.labels is targets.labels
    assert scaled.mask is targets.mask
    assert scaled.ignore is targets.ignore
    assert targets_of(1, content=False).scaled(2.0, 2.0).content is None


def test_a_function_reaches_every_tensor() -> None:
    some = targets_of(4).map(itemgetter(slice(1, 3)))
    assert some.labels.tolist() == [[2, 3], [4, 5]]
    assert some.content is not None
    assert {len(t) for t in (some.boxes, some.labels, some.mask, some.ignore, some.content)} == {2}
    assert targets_of(4, content=False).map(itemgetter(slice(1, 3))).content is None


def test_a_part_of_a_batch_is_every_so_many_images() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).repeat(1, 3, 2, 2)
    metas = [ImageMeta(i, f"{i}.jpg", 48, 64) for i in range(6)]
    batch = Batch(images, targets_of(6), torch.zeros(6, 4), metas, (1, 2))
    part = batch.part(1, 3)
    assert part.images[:, 0, 0, 0].tolist() == [1, 4]
    assert part.targets.labels.tolist() == [[2, 3], [8, 9]]
    assert [meta.image_id for meta in part.meta] == [1, 4]
    assert part.place == (3, 6)
    assert batch.part(0, 1) is batch
