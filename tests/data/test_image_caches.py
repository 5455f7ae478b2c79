"""Caches of decoded images: the same samples, shared by processes, refused when they do not fit, never stale."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.data.conftest import NAMES, MakeSet
from yoloxkd import Trainer
from yoloxkd.config.augment import Augment
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.data.io import image_caches as caches
from yoloxkd.data.io.image_caches import (
    DiskCache,
    Kind,
    RamCache,
    RecentImages,
    image_bytes,
    image_folder,
    with_cache,
)
from yoloxkd.data.loader import train_loader
from yoloxkd.errors import UserError
from yoloxkd.types import Batch

GB = 10**9


@pytest.fixture
def data(make_set: MakeSet) -> DetectionData:
    """Two JPEG and a PNG."""
    return read_coco(*make_set(), NAMES, "train")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLOXKD_HOME", str(tmp_path / "home"))


def epochs(data: DetectionData, workers: int = 0, size: int | tuple[int, int] = 48) -> list[Batch]:
    mosaic = 0.7 if isinstance(size, int) else 0.0
    augment = Augment(mosaic=mosaic, scale=(0.1, 1.0), flip=0.5)
    loader = train_loader(data, imgsz=size, batch=1, augment=augment, seed=1, workers=workers)
    batches: list[Batch] = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize("size", [48, (32, 64)])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_samples_are_the_same(data: DetectionData, kind: Kind, size: int | tuple[int, int]) -> None:
    cached, val, note = with_cache(data, data, kind, 0)
    assert "6 decoded images" in note
    plain = epochs(data, size=size)
    for _ in range(2):
        for a, b in zip(plain, epochs(cached, size=size), strict=True):
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_array_equal(a.targets.boxes, b.targets.boxes)
    np.testing.assert_array_equal(val.read(1), data.read(1))
    assert [cached.read_reduced(i, 4)[1] for i in range(3)] == [4, 1, 4]


@pytest.mark.parametrize("reduce", [1, 2])
def test_memory_keeps_what_it_has_read(data: DetectionData, reduce: int) -> None:
    cache = RamCache(data)
    first = [cache.read(i, reduce)[0].copy() for i in range(3)]
    for path in data.paths:
        Path(path).unlink()
    for index, picture in enumerate(first):
        again, found = cache.read(index, reduce)
        np.testing.assert_array_equal(again, picture)
        assert found == (1 if index == 1 else reduce)
        assert not again.flags.writeable
    with pytest.raises(UserError, match="No such file"):
        cache.read(0, 4)


def test_the_last_images_stay_until_there_are_too_many(data: DetectionData) -> None:
    def read(cache: RecentImages, *indices: int) -> list[tuple[int, int]]:
        for index in indices:
            np.testing.assert_array_equal(cache.read(index, 1)[0], data.read(index))
        assert cache.bytes == sum(picture.nbytes for picture, _ in cache.images.values())
        return list(cache.images)

    assert read(RecentImages(data, 2), 0, 1, 0, 2) == [(1, 1), (2, 1)]
    assert read(RecentImages(data, 9, limit=64 * 48 * 3 + 1), 1, 2, 0) == [(0, 1)]
    assert read(RecentImages(data, 9, limit=10), 0) == []
    cache = RecentImages(data, 9)
    read(cache, 0, 1)
    Path(data.paths[0]).unlink()
    assert cache.read(0, 1)[0].shape == (48, 64, 3)
    assert len(pickle.loads(pickle.dumps(cache)).images) == 0


def test_workers_fill_one_memory(data: DetectionData) -> None:
    cached, _, _ = with_cache(data, data, "ram", 2)
    plain = epochs(data)
    filled = epochs(cached, workers=2)
    assert isinstance(cached.cache, RamCache)
    assert (cached.cache.states[:, 0] == 1).all()
    for path in data.paths:
        Path(path).unlink()
    for a, b, c in zip(plain, filled, epochs(cached, workers=1), strict=True):
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.images, c.images)


def test_a_changed_source_is_decoded_again(data: DetectionData) -> None:
    folder = image_folder()
    old = DiskCache(data, folder).read(1, 1)[0]
    assert len(list(folder.iterdir())) == 1
    path = Path(data.paths[1])
    changed = 255 - old
    assert cv2.imwrite(str(path), changed[..., ::-1])
    os.utime(path, ns=(1, 1))
    np.testing.assert_array_equal(DiskCache(data, folder).read(1, 1)[0], changed)
    assert len(list(folder.iterdir())) == 1
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        DiskCache(data, folder).read(1, 1)


def test_a_file_is_used_again_unless_it_is_cut_or_of_another_size(data: DetectionData) -> None:
    folder = image_folder()
    DiskCache(data, folder).read(0, 2)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    marked, found = DiskCache(data, folder).read(0, 2)
    assert found == 2
    assert marked[-1, -1, -1] == content[-1]  # read from the file
    file.write_bytes(content[:-5])
    assert DiskCache(data, folder).read(0, 2)[0][-1, -1, -1] != content[-1]
    assert len(file.read_bytes()) == len(content)
    data.sizes[0] = (64, 48)
    with pytest.raises(UserError, match=r"its annotation file says 48x64"):
        DiskCache(data, folder).read(0, 1)


def _fill(data: DetectionData, folder: Path) -> None:
    cache = DiskCache(data, folder)
    for _ in range(20):
        for index in range(len(data)):
            os.utime(data.paths[index])  # so that every read writes
            cache.read(index, 1)


def test_two_runs_share_a_folder(data: DetectionData) -> None:
    folder = image_folder()
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_fill, args=(data, folder)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert sorted(len(file.name) for file in folder.iterdir()) == [42, 42, 42]
    for index in range(3):
        np.testing.assert_array_equal(DiskCache(data, folder).read(index, 1)[0], data.read(index))


def test_a_full_disk_costs_the_cache_alone(
    data: DetectionData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache = DiskCache(data, image_folder())
    for _ in range(2):
        np.testing.assert_array_equal(cache.read(0, 1)[0], data.read(0))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert list(image_folder().iterdir()) == []


def test_what_does_not_fit_is_refused(data: DetectionData, monkeypatch: pytest.MonkeyPatch) -> None:
    data.sizes = np.array([[10_000, 10_000]] * 3)
    assert image_bytes(data.sizes, (1, 2)).tolist() == [[300_000_000, 75_000_000]] * 3
    monkeypatch.setattr(caches, "available_memory", lambda: 2 * GB)
    with pytest.raises(
        UserError, match=r"6 decoded images take up to 2.1 GB, and 2.0 GB of memory are free.*=disk or off"
    ):
        with_cache(data, data, "ram", 0)
    monkeypatch.setattr(caches, "available_memory", lambda: 3 * GB)
    assert with_cache(data, data, "ram", 0)[2].endswith("2.1 GB when all are read")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"4\.2 GB"):
        with_cache(data, data, "ram", 0)
    monkeypatch.setattr(caches.shutil, "disk_usage", lambda _: type("Usage", (), {"free": GB})())
    with pytest.raises(UserError, match=r"2.1 GB, and 1.0 GB on the disk of .*pictures are free.*=off"):
        with_cache(data, data, "disk", 0)


def test_the_memory_of_this_machine() -> None:
    assert 10**7 < caches.available_memory() < 10**14


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_run_with_a_cache(toy: Path, tmp_path: Path, kind: str) -> None:
    keys = {"student.width": 0.125, "augment.multiscale": 0, "engine.workers": 1, "engine.cache": kind}
    keys |= {"callbacks.report": False, "callbacks.plots": False}
    Trainer(
        student="yolox-nano", data=str(toy), epochs=1, batch=8, imgsz=64, device="cpu", set=keys, out=tmp_path / "run"
    ).fit()
    assert "29 decoded images in" in (tmp_path / "run" / "train.log").read_text()
