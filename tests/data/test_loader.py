"""Samples are pure functions of their key; batches, their order, and errors that cross processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.conftest import CONTENT, NAMES, MakeSet
from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.mosaic import mosaic
from yoloxkd.data.augment.transforms import Sample
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.data.io.images import read_image
from yoloxkd.data.loader import Collate, eval_loader, train_loader
from yoloxkd.data.sampler import EpochSampler, epoch_order
from yoloxkd.data.samples import EvalSamples, TrainSamples
from yoloxkd.errors import UserError
from yoloxkd.types import Batch

SIZE = 64


@pytest.fixture
def data(make_set: MakeSet) -> DetectionData:
    return read_coco(*make_set(), NAMES, "train")


def sample_of(samples: TrainSamples, *key: Any) -> Sample:
    sample = samples[key]  # type: ignore[index]
    assert isinstance(sample, Sample)
    return sample


def fingerprint(sample: Sample) -> bytes:
    return sample.image.tobytes() + sample.boxes.tobytes() + sample.labels.tobytes()


def same_batch(a: Batch, b: Batch) -> bool:
    pairs = [(a.images, b.images), (a.content, b.content)]
    pairs += [(getattr(a.targets, k), getattr(b.targets, k)) for k in ("boxes", "labels", "mask", "ignore")]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("strong", [True, False])
def test_a_sample_depends_on_its_key_alone(data: DetectionData, strong: bool) -> None:
    augment = Augment(mixup=0.5, gray=0.2, blur=0.5)
    first, again = TrainSamples(data, SIZE, augment, 3), TrainSamples(data, SIZE, augment, 3)
    keys = [(epoch, index, strong) for epoch in range(2) for index in range(3)]
    forward = [fingerprint(sample_of(first, *key)) for key in keys]
    backward = [fingerprint(sample_of(again, *key)) for key in reversed(keys)]
    assert forward == backward[::-1]
    assert len(set(forward)) == len(forward)
    assert fingerprint(sample_of(TrainSamples(data, SIZE, augment, 4), *keys[0])) != forward[0]


def test_without_strong_augmentation_there_is_no_mosaic(data: DetectionData) -> None:
    samples = TrainSamples(data, SIZE, Augment(hsv_prob=0, flip=0), 0)
    weak, plain = sample_of(samples, 0, 0, False), EvalSamples(data, SIZE)[0]
    assert isinstance(plain, Sample)
    np.testing.assert_array_equal(weak.image, plain.image)
    np.testing.assert_array_equal(weak.boxes, plain.boxes)
    assert (sample_of(samples, 0, 0, True).image != plain.image).any()


def test_a_flip_keeps_padding_at_the_right(data: DetectionData) -> None:
    """Image 2 is 64 high and 32 wide: its content is the left half."""
    plain = EvalSamples(data, SIZE)[2]
    flipped = sample_of(TrainSamples(data, SIZE, Augment(hsv_prob=0, flip=1), 0), 0, 2, False)
    assert isinstance(plain, Sample)
    assert flipped.content.tolist() == plain.content.tolist() == [0, 0, 32, 64]
    np.testing.assert_array_equal(flipped.image[:, :32], plain.image[:, 31::-1])
    assert (flipped.image[:, 32:] == 114).all()
    assert plain.boxes[0].tolist() == [2, 4, 12, 24]
    assert flipped.boxes[0].tolist() == [20, 4, 30, 24]


def test_eval_samples_carry_the_way_back(data: DetectionData) -> None:
    sample = EvalSamples(data, 48, (1, 2, 3))[0]
    assert isinstance(sample, Sample)
    assert (sample.meta.image_id, sample.meta.height, sample.meta.width) == (30, 48, 64)
    assert sample.meta.scale == 48 / 64
    np.testing.assert_allclose(sample.boxes / sample.meta.scale, data.annotations(0)[0], rtol=1e-6)
    assert (sample.image[36:] == (1, 2, 3)).all()


def test_collate_pads_and_marks(data: DetectionData) -> None:
    batch = Collate()([EvalSamples(data, SIZE)[i] for i in range(3)])
    assert isinstance(batch, Batch)
    assert (batch.images.shape, batch.images.dtype) == ((3, 3, 64, 64), torch.uint8)
    targets = batch.targets
    assert targets.boxes.shape == (3, 8, 4)
    assert targets.mask.sum(1).tolist() == [1, 0, 1]
    assert targets.ignore.sum(1).tolist() == [0, 0, 1]
    assert not (targets.mask & targets.ignore).any()
    padding = ~(targets.mask | targets.ignore)
    assert not targets.boxes[padding].any()
    assert not targets.labels[padding].any()
    assert targets.labels[targets.mask].tolist() == [1, 0]
    plain = EvalSamples(data, SIZE)[1]
    assert isinstance(plain, Sample)
    np.testing.assert_array_equal(batch.images[1].permute(1, 2, 0), plain.image)
    assert [m.image_id for m in batch.meta] == [30, 10, 20]
    assert batch.content.tolist() == [[0, 0, 64, 48], [0, 0, 64, 64], [0, 0, 32, 64]]


def test_padded_rows_come_in_few_sizes(data: DetectionData) -> None:
    sample = EvalSamples(data, SIZE)[0]
    assert isinstance(sample, Sample)
    for n, rows in ((0, 8), (8, 8), (9, 16)):
        sample.boxes, sample.labels = np.zeros((n, 4), np.float32), np.zeros(n, np.int64)
        sample.crowd = np.zeros(n, bool)
        batch = Collate()([sample])
        assert isinstance(batch, Batch)
        assert batch.targets.boxes.shape[1] == rows


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(data: DetectionData, workers: int) -> None:
    def run(number: int) -> list[Batch]:
        loader = train_loader(data, imgsz=64, batch=1, augment=Augment(blur=0.5), seed=1, workers=number)
        batches = []
        for epoch, strong in ((0, True), (1, False)):
            loader.set_epoch(epoch, strong)
            batches += list(loader)
        return batches

    alone, shared = run(0), run(workers)
    assert len(alone) == len(shared) == 6
    assert all(same_batch(a, b) for a, b in zip(alone, shared, strict=True))
    assert not same_batch(alone[0], alone[3])


def test_reading_leaves_the_global_random_state_alone(data: DetectionData) -> None:
    before = torch.get_rng_state()
    loader = train_loader(data, imgsz=64, batch=2, augment=Augment(noise=1.0), seed=1)
    assert len(list(loader)) == len(loader) == 1
    assert torch.equal(before, torch.get_rng_state())


def test_what_workers_get_can_be_pickled(data: DetectionData) -> None:
    """As needed where processes are spawned, not forked."""
    samples = pickle.loads(pickle.dumps(TrainSamples(data, SIZE, Augment(gray=1.0), 0)))
    original = TrainSamples(data, SIZE, Augment(gray=1.0), 0)
    assert fingerprint(samples[0, 0, True]) == fingerprint(sample_of(original, 0, 0, True))
    loader = train_loader(data, imgsz=64, batch=2, augment=Augment(), seed=0, workers=1)
    pickle.dumps((loader.collate_fn, loader.worker_init_fn))
    batch = Collate()([samples[0, 0, False]])
    assert isinstance(batch, Batch)
    assert same_batch(pickle.loads(pickle.dumps(batch)), batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_reaches_the_user_as_one_sentence(data: DetectionData, workers: int) -> None:
    Path(data.paths[1]).write_bytes(b"")
    for loader in (
        eval_loader(data, imgsz=64, batch=2, workers=workers),
        train_loader(data, imgsz=64, batch=3, augment=Augment(mosaic=0), seed=0, workers=workers),
    ):
        with pytest.raises(UserError) as caught:
            list(loader)
        assert str(caught.value) == f"the image {data.paths[1]} is empty; replace it or leave it out"


def test_eval_loader_gives_every_image_once_in_order(data: DetectionData) -> None:
    batches = list(eval_loader(data, imgsz=64, batch=2))
    assert [[m.image_id for m in b.meta] for b in batches] == [[30, 10], [20]]
    shares = [
        [m.image_id for b in eval_loader(data, imgsz=64, batch=2, rank=r, world=2) for m in b.meta] for r in (0, 1)
    ]
    assert shares == [[30, 20], [10]]


def test_images_without_any_box_train(data: DetectionData) -> None:
    data.boxes, data.labels, data.crowd = data.boxes[:0], data.labels[:0], data.crowd[:0]
    data.offsets = np.zeros(4, np.int64)
    loader = train_loader(data, imgsz=64, batch=3, augment=Augment(mixup=1.0), seed=0)
    batch = next(iter(loader))
    assert batch.targets.boxes.shape == (3, 8, 4)
    assert not batch.targets.mask.any()


def test_an_empty_split_cannot_be_trained_on(data: DetectionData) -> None:
    with pytest.raises(UserError, match="'train' has no image"):
        train_loader(data.head(0), imgsz=64, batch=2, augment=Augment(), seed=0)


def keys_of(sampler: EpochSampler) -> list[list[int]]:
    return [[index for _, index, _ in batch] for batch in sampler]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_an_epoch_s_batches(n: int, batch: int, world: int, epoch: int) -> None:
    samplers = [EpochSampler(n, batch, 7, rank, world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ranks = [keys_of(sampler) for sampler in samplers]
    assert {len(keys) for keys in ranks} == {len(samplers[0])} == {max(1, n // (batch * world))}
    sizes = {len(b) for keys in ranks for b in keys}
    assert sizes == {min(batch, max(1, n // world))}
    seen = [index for keys in ranks for b in keys for index in b]
    assert set(seen) <= set(range(n))
    if n >= world:
        assert len(set(seen)) == len(seen)


def test_epochs_differ_and_can_be_entered_midway() -> None:
    sampler = EpochSampler(40, 4, 0)
    first = keys_of(sampler)
    assert keys_of(sampler) == first
    sampler.set_epoch(1)
    second = keys_of(sampler)
    assert second != first
    sampler.set_epoch(1, start_batch=7)
    assert keys_of(sampler) == second[7:]
    assert len(sampler) == 10
    sampler.set_epoch(1, strong=False)
    assert {key[2] for batch in sampler for key in batch} == {False}
    assert keys_of(EpochSampler(40, 4, 1)) != first


def reads_of(make_set: MakeSet, pool: int, n: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[set[int]], int]:
    """The images of each mosaic of the first epoch, in its order, and how many files were decoded."""
    row = {"file_name": "a.jpg", "height": 48, "width": 64}
    content = copy.deepcopy(CONTENT) | {"images": [row | {"id": i} for i in range(n)], "annotations": []}
    data = read_coco(*make_set(content), NAMES, "train")
    shown: list[set[int]] = []
    decoded: list[str] = []

    def watched(data: DetectionData, indices: list[int], *rest: Any) -> Sample:
        shown.append(set(indices))
        return mosaic(data, indices, *rest)

    def counted(path: str, *rest: Any) -> Any:
        decoded.append(path)
        return read_image(path, *rest)

    monkeypatch.setattr("yoloxkd.data.samples.mosaic", watched)
    for module in ("io.image_caches", "dataset"):
        monkeypatch.setattr(f"yoloxkd.data.{module}.read_image", counted)
    augment = Augment(mosaic_pool=pool, scale=(1.0, 1.0), hsv_prob=0)
    list(train_loader(data, imgsz=64, batch=4, augment=augment, seed=0))
    return shown, len(decoded)


@pytest.mark.parametrize("pool", [0, 8])
def test_a_mosaic_is_made_of_images_read_before(make_set: MakeSet, pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 60
    shown, decoded = reads_of(make_set, pool, n, monkeypatch)
    order = epoch_order(n, 0, 0).tolist()
    away = [(place - order.index(i)) % n for place, indices in enumerate(shown) for i in indices]
    assert len(shown) == n
    if pool:
        assert set(away) == set(range(pool + 1))
        assert decoded <= n + 3 * pool  # the first mosaics look back to the end of the order
    else:
        assert max(away) > 40
        assert decoded > 2 * n
