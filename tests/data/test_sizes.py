"""Inputs of two sides: the size rule, boxes that follow pixels, padding, and batches of one orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_mosaic import SIZES, extent, painted
from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.transforms import Sample, fit_within, largest_input, network_input
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.loader import Collate, eval_loader, train_loader
from yoloxkd.data.sampler import EpochSampler
from yoloxkd.data.samples import EvalSamples, TrainSamples
from yoloxkd.types import Batch

PLAIN = Augment(mosaic=0, hsv_prob=0, flip=0)
PAD = (10, 20, 30)


@pytest.mark.parametrize(
    ("height", "width", "new"),
    [(480, 640, (800, 1067)), (640, 480, (1067, 800)), (427, 640, (800, 1199)), (300, 1000, (400, 1333))],
)
def test_the_short_side_or_the_long_one_decides(height: int, width: int, new: tuple[int, int]) -> None:
    scale, *found = fit_within(height, width, 800, 1333)
    assert tuple(found) == new
    assert scale == pytest.approx(new[0] / height, rel=2e-3)
    assert largest_input((800, 1333), 32) == (800, 1344)


@pytest.fixture
def data(tmp_path: Path) -> DetectionData:
    return painted(tmp_path, ".png")


def test_the_images_differ_in_orientation() -> None:
    assert {h > w for h, w in SIZES[:4]} == {True, False}


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("index", range(4))
def test_boxes_follow_the_pixels(data: DetectionData, index: int, flip: int) -> None:
    augment = PLAIN.model_copy(update={"flip": flip, "short_sides": [64, 200]})
    samples = TrainSamples(data, (150, 256), augment, 0)
    for epoch in range(3):
        sample = samples[epoch, index, True]
        assert isinstance(sample, Sample)
        assert sample.content.tolist() == [0, 0, sample.image.shape[1], sample.image.shape[0]]
        assert 64 <= min(sample.image.shape[:2]) <= 200
        assert max(sample.image.shape[:2]) <= 256
        assert np.abs(extent(sample.image, (100 + 50 * index) / 2) - sample.boxes[0]).max() <= 1


def test_short_sides_are_drawn_for_each_sample(data: DetectionData) -> None:
    def shorts(choices: list[int]) -> list[int]:
        samples = TrainSamples(data, (64, 1000), PLAIN.model_copy(update={"short_sides": choices}), 0)
        found = [samples[epoch, 0, True] for epoch in range(12)]
        return [min(s.image.shape[:2]) for s in found if isinstance(s, Sample)]

    assert set(shorts([])) == {64}
    assert set(shorts([40, 48, 56])) == {40, 48, 56}
    assert len(set(shorts([40, 60]))) > 3
    assert min(shorts([40, 60])) >= 40
    assert max(shorts([40, 60])) <= 60


def test_a_batch_is_padded_to_its_largest_member(data: DetectionData) -> None:
    samples = [EvalSamples(data, (64, 100))[i] for i in range(4)]
    batch = Collate(32, PAD, mask_padding=True)(samples)
    assert isinstance(batch, Batch)
    sizes = [s.image.shape[:2] for s in samples if isinstance(s, Sample)]
    high, wide = max(h for h, _ in sizes), max(w for _, w in sizes)
    assert batch.images.shape == (4, 3, -(-high // 32) * 32, -(-wide // 32) * 32)
    assert batch.targets.content is batch.content
    for image, content, sample in zip(batch.images.numpy(), batch.content.tolist(), samples, strict=True):
        assert isinstance(sample, Sample)
        h, w = sample.image.shape[:2]
        assert content == [0, 0, w, h]
        np.testing.assert_array_equal(image[:, :h, :w].transpose(1, 2, 0), sample.image)
        assert (image[:, h:].reshape(3, -1) == np.array(PAD)[:, None]).all()
        assert (image[:, :, w:].reshape(3, -1) == np.array(PAD)[:, None]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_are_of_one_kind(data: DetectionData, workers: int) -> None:
    augment = Augment(mosaic=0, short_sides=[40, 80])
    kinds = [h > w for h, w in SIZES[:4]]
    loader = train_loader(data, imgsz=(64, 128), batch=2, augment=augment, seed=3, workers=workers)
    alone = train_loader(data, imgsz=(64, 128), batch=2, augment=augment, seed=3)
    for one in (loader, alone):
        one.set_epoch(1)
    batches = list(loader)
    assert len(batches) == 2
    for batch, same in zip(batches, alone, strict=True):
        np.testing.assert_array_equal(batch.images, same.images)
        np.testing.assert_array_equal(batch.targets.boxes, same.targets.boxes)
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
        if sum(kinds) in (0, 2, 4):
            assert len({m.height > m.width for m in batch.meta}) == 1


@settings(max_examples=80, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 3), st.integers(0, 3))
def test_orientation_changes_the_order_alone(kinds: list[bool], batch: int, world: int, epoch: int) -> None:
    portrait = np.array(kinds)
    samplers = [EpochSampler(len(kinds), batch, 5, rank, world, portrait) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [[[index for _, index, _ in keys] for keys in sampler] for sampler in samplers]
    assert ranks == [[[index for _, index, _ in keys] for keys in sampler] for sampler in samplers]
    assert {len(keys) for keys in ranks} == {max(1, len(kinds) // (samplers[0].batch * world))}
    steps = [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)]
    if len(kinds) >= world:
        seen = [index for step in steps for index in step]
        assert len(set(seen)) == len(seen)
    mixed = [step for step in steps if len({kinds[i] for i in step}) == 2]
    assert len(mixed) <= 1


@pytest.mark.parametrize("imgsz", [96, (64, 96)])
def test_rectangular_evaluation(data: DetectionData, imgsz: int | tuple[int, int]) -> None:
    batches = list(eval_loader(data, imgsz=imgsz, batch=2, rect=True, multiple=8, pad_value=PAD))
    metas = [m for batch in batches for m in batch.meta]
    assert sorted(m.image_id for m in metas) == [0, 1, 2, 3]
    ratios = [m.height / m.width for m in metas]
    assert ratios == sorted(ratios)
    assert sum(b.images.shape[2] * b.images.shape[3] for b in batches) < 96 * 96 * len(batches)
    for batch in batches:
        assert batch.images.shape[2] % 8 == batch.images.shape[3] % 8 == 0
        assert batch.targets.content is None
        for meta, image, boxes in zip(batch.meta, batch.images.numpy(), batch.targets.boxes.numpy(), strict=True):
            level = (100 + 50 * meta.image_id) / 2
            shown = image[0][: int(meta.height * meta.scale), : int(meta.width * meta.scale)]
            assert np.abs(extent(shown[..., None], level) - boxes[0]).max() <= 1


def test_one_image_becomes_an_input_as_in_a_batch(data: DetectionData) -> None:
    picture = data.read(1)
    for imgsz, rect in ((96, False), ((64, 96), True)):
        alone, scale, left, top = network_input(picture, imgsz, 32, PAD)
        batch = next(iter(eval_loader(data.head(2), imgsz=imgsz, batch=2, rect=rect, pad_value=PAD)))
        where = [m.image_id for m in batch.meta].index(1)
        assert (left, top, scale) == (0, 0, batch.meta[where].scale)
        height, width = alone.shape[:2]
        np.testing.assert_array_equal(batch.images[where, :, :height, :width].permute(1, 2, 0), alone)
