"""Memory of a large split: little to load, shared by workers, and none of it grows over epochs."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from yoloxkd.config.augment import Augment
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="private memory is read from /proc/<pid>/smaps_rollup"
)
NAMES = ["cat", "dog", "cow"]


def large_set(folder: Path, images: int, boxes: int, outlines: bool = False) -> tuple[Path, Path]:
    """Many entries for few image files; with segmentations to be passed over, if asked for."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(8):
        assert cv2.imwrite(str(folder / "images" / f"{i}.jpg"), random.integers(0, 255, (32, 32, 3), np.uint8))
    pictures = [{"id": i + 1, "file_name": f"{i % 8}.jpg", "height": 32, "width": 32} for i in range(images)]
    corners = random.integers(0, 16, (boxes, 2)).tolist()
    outline = [[float(v) for v in range(40)]] if outlines else []
    rows = [
        {"id": k + 1, "image_id": k % images + 1, "category_id": k % 3, "bbox": [*c, 12, 12], "segmentation": outline}
        for k, c in enumerate(corners)
    ]
    categories = [{"id": k, "name": name} for k, name in enumerate(NAMES)]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": pictures, "annotations": rows, "categories": categories}))
    return folder / "images", file


def private_bytes(pid: int | str) -> int:
    """What a process has for itself alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def array_bytes(data: DetectionData) -> int:
    columns = (data.boxes, data.labels, data.crowd, data.areas, data.annotation_ids, data.offsets, data.sizes)
    return sum(column.nbytes for column in columns)


def most_bytes() -> int:
    """The most this process has had in memory; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


@pytest.mark.slow
def test_loading_takes_no_more_than_blocks_and_arrays(tmp_path: Path) -> None:
    """In a process of its own, so that the most it ever had is the reader's."""
    images, file = large_set(tmp_path, 5000, 50_000, outlines=True)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        arrays, grown = pool.apply(_load, (images, file))
        tree = pool.apply(_parse, (file,))
    assert arrays == pytest.approx(50_000 * (4 * 8 + 3 * 8 + 1) + 5000 * 16, rel=0.01)
    assert grown < 60e6
    assert tree > 1.5 * grown  # what is avoided


def _load(images: Path, file: Path) -> tuple[int, int]:
    before = most_bytes()
    data = read_coco(images, file, NAMES, "train")
    return array_bytes(data), most_bytes() - before


def _parse(file: Path) -> int:
    before = most_bytes()
    json.loads(file.read_bytes())
    return most_bytes() - before


def _touch(data: DetectionData, paths: Sequence[str], rounds: int) -> list[int]:
    """Read everything a worker reads of every image, in another process: its private memory after each round."""

    def work(results: Any) -> None:
        for _ in range(rounds):
            for i in range(len(data)):
                data.annotations(i)
                hash(paths[i])
            results.put(private_bytes("self"))

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=work, args=(results,))
    process.start()
    found = [results.get(timeout=120) for _ in range(rounds)]
    process.join()
    return found


@pytest.mark.slow
def test_a_worker_shares_what_it_reads(tmp_path: Path) -> None:
    data = read_coco(*large_set(tmp_path, 30_000, 60_000), NAMES, "train")
    shared = _touch(data, data.paths, 3)
    assert shared[-1] - shared[0] < 1e6
    copied = _touch(data, list(data.paths), 3)
    assert copied[0] - shared[0] > 2e6  # what a list of as many strings costs each worker


@pytest.mark.slow
def test_epochs_do_not_grow(tmp_path: Path) -> None:
    """In a process of its own: workers forked from one that has run other tests copy pages of theirs at any time."""
    images, file = large_set(tmp_path, 1200, 12_000)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its process may have children
        after = pool.submit(_train_epochs, images, file).result()
    assert (np.array(after[-1]) - np.array(after[1]) < 1e6).all(), after


def _train_epochs(images: Path, file: Path) -> list[list[int]]:
    """Private memory of the process and of its two workers after each of four epochs."""
    from yoloxkd.data.loader import train_loader

    data = read_coco(images, file, NAMES, "train")
    augment = Augment(mosaic=0.1, mixup=0.0, hsv_prob=0.0)
    loader = train_loader(data, imgsz=32, batch=100, augment=augment, seed=0, workers=2)
    after: list[list[int]] = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        assert sum(len(batch.images) for batch in loader) == 1200
        workers = [process.pid for process in multiprocessing.active_children()]
        assert len(workers) == 2
        after.append([private_bytes(pid) for pid in ["self", *workers]])
    return after
