"""Loading COCO JSON of the size of COCO's own training split, and the memory of the processes that read it."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from benchmarks.report import Row, run_script
from benchmarks.timing import Spread
from yoloxkd.data.formats.coco import read_coco

NAMES = [f"class {k}" for k in range(80)]
SIZE = 64  # px of every image, all of them links to a few files


def write_set(folder: Path, images: int, boxes: int) -> Path:
    """ImageColumns under images/, and instances.json with the keys that COCO's own file has; without outlines."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(images):
        file = folder / "images" / f"{i:012d}.jpg"
        if i % 20_000 == 0:  # a file system allows only so many names for one file
            first = file
            assert cv2.imwrite(str(file), random.integers(0, 255, (SIZE, SIZE, 3), np.uint8))
        else:
            os.link(first, file)
    rows = (
        {"id": i + 1, "file_name": f"{i:012d}.jpg", "height": SIZE, "width": SIZE, "license": 1} for i in range(images)
    )
    where, what = random.integers(0, images, boxes), random.integers(0, 80, boxes)
    corners, sides = random.uniform(0, 30, (boxes, 2)).round(2), random.uniform(4, 30, (boxes, 2)).round(2)
    found = (
        {"segmentation": [], "area": float(sides[k].prod()), "iscrowd": 0, "image_id": int(where[k]) + 1}
        | {"bbox": [*corners[k].tolist(), *sides[k].tolist()], "category_id": int(what[k]) + 1, "id": k + 1}
        for k in range(boxes)
    )
    file = folder / "instances.json"
    with file.open("w") as out:
        out.write('{"images": [' + ", ".join(map(json.dumps, rows)) + '], "annotations": [')
        for k, row in enumerate(found):
            out.write((", " if k else "") + json.dumps(row))
        out.write('], "categories": ' + json.dumps([{"id": k + 1, "name": n} for k, n in enumerate(NAMES)]) + "}")
    return file


def _status(key: str) -> float:
    """MB, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def load(file: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds, and the most memory of this process, MB."""
    wall, cpu = time.perf_counter(), time.process_time()
    read_coco(file.parent / "images", file, NAMES, "train")
    return time.perf_counter() - wall, time.process_time() - cpu, _status("VmHWM")


def growth(file: Path) -> tuple[float, float]:
    """Private memory of a loader process after the first quarter of two epochs, and what it grew by until the end, MB."""
    from yoloxkd.config.augment import Augment
    from yoloxkd.data.loader import train_loader

    data = read_coco(file.parent / "images", file, NAMES, "train")
    plain = Augment(mosaic=0.0, mixup=0.0, hsv_prob=0.0)
    loader = train_loader(data, imgsz=32, batch=100, augment=plain, seed=0, workers=2)
    seen: list[float] = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        for step, _ in enumerate(loader):
            if step % max(1, len(loader) // 4) == 0:
                seen.append(max(_private(p.pid) for p in multiprocessing.active_children()))
    return seen[1], seen[-1] - seen[1]


def _private(pid: int | None) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def measure(quick: bool) -> Iterator[Row]:
    images, boxes = (600, 4500) if quick else (120_000, 900_000)
    what = f"{images:,} images, {boxes:,} boxes"
    with tempfile.TemporaryDirectory() as folder:
        file = write_set(Path(folder), images, boxes)
        size = f"file of {file.stat().st_size / 1e6:.0f} MB"
        context = multiprocessing.get_context("spawn")
        with context.Pool(1, maxtasksperchild=1) as pool:
            found = [pool.apply(load, (file,)) for _ in range(1 if quick else 3)]
        wall, cpu, most = (Spread.of(list(column)) for column in zip(*found, strict=True))
        yield Row(f"{what}: load", wall, cpu, at_most=20, unit="s", note=size)
        yield Row(f"{what}: most memory of the process", most, at_most=1000, unit="MB", note="without torch")
        private, grown = growth(file)
        yield Row(
            f"{what}: growth of a loader process over two epochs",
            Spread.of([grown]),
            at_most=5,
            unit="MB",
            note=f"its private memory: {private:.0f} MB",
        )


if __name__ == "__main__":
    run_script("large_coco", "COCO JSON of 120,000 images", measure)
