"""Training images through loader processes: images a second by how many there are, for a GPU that waits for them.

JPEG files of COCO's size, YOLOX's mosaic and mixup at 640 px, from files to batches in the main process. They are of this machine: what
16 cores give beside a GPU is measured there (`make bench-gpu` has the same rows).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from benchmarks.report import Row, run_script
from benchmarks.timing import Spread
from yoloxkd.config.augment import Augment
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.data.loader import Loader, train_loader
from yoloxkd.data.samples import TrainSamples
from yoloxkd.types import Batch

TITLE = "Training images from JPEG files, mosaic and mixup at 640 px, by loader processes"
HEIGHT, WIDTH, BOXES, BATCH = 480, 640, 8, 16
GOAL = 2000
"""Images a second that 16 cores should give."""


def photographs(folder: Path, images: int) -> DetectionData:
    """Colored clouds with grain, whose files are as large as those of photographs (about 100 kB), with boxes anywhere."""
    rng = np.random.default_rng(0)
    records: dict[str, list[object]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number in range(1, images + 1):
        clouds = cv2.resize(
            rng.integers(0, 256, (12, 16, 3)).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC
        )
        picture = np.clip(clouds + rng.normal(0, 6, clouds.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 92])
        records["images"].append({"id": number, "file_name": f"{number}.jpg", "height": HEIGHT, "width": WIDTH})
        for x, y in rng.uniform(0, (WIDTH - 80, HEIGHT - 80), (BOXES, 2)).tolist():
            one = {"id": len(records["annotations"]) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
            records["annotations"].append({**one, "bbox": [x, y, 80, 80], "area": 6400})
    (folder / "train.json").write_text(json.dumps(records))
    return read_coco(folder, folder / "train.json", ["thing"], "train")


def counts(cores: int) -> list[int]:
    """1, 2, 4, ... processes and as many as cores."""
    return sorted({*(2**n for n in range(cores.bit_length()) if 2**n <= cores), cores})


def rates(loader: Loader, parts: int, seconds: float) -> list[float]:
    """Images a second in that many parts of some seconds each, once every process has given a batch."""
    found: list[float] = []
    batches = endless(loader)
    for _ in range(2 * loader.num_workers):
        next(batches)
    for _ in range(parts):
        images, started = 0, time.perf_counter()
        while (passed := time.perf_counter() - started) < seconds:
            images += len(next(batches).images)
        found.append(images / passed)
    return found


def endless(loader: Loader) -> Iterator[Batch]:
    for epoch in range(sys.maxsize):
        loader.set_epoch(epoch)
        yield from loader


def decoding_share(data: DetectionData, size: int, images: int) -> Spread:
    """Part of a sample's processor time that goes into reading and decoding its files; the rest is what a GPU could do."""
    honest, spent = DetectionData.read_reduced, [0.0]

    def timed(self: DetectionData, index: int, reduce: int) -> tuple[np.ndarray, int]:
        started = time.process_time()
        found = honest(self, index, reduce)
        spent[0] += time.process_time() - started
        return found

    samples, shares = TrainSamples(data, size, Augment(), 0), []
    DetectionData.read_reduced = timed  # type: ignore[method-assign]
    try:
        for part in range(5):
            spent[0], started = 0.0, time.process_time()
            for draw in range(part * images, (part + 1) * images):
                samples[0, draw % len(data), True]
            shares.append(spent[0] / (time.process_time() - started))
    finally:
        DetectionData.read_reduced = honest  # type: ignore[method-assign]
    return Spread.of(shares)


def measure(quick: bool, between: bool = True) -> Iterator[Row]:
    """With one process and with as many as cores, and with powers of two in `between`."""
    cores = len(os.sched_getaffinity(0))
    one: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(Path(folder), 16 if quick else 256)
        yield Row(
            "reading and decoding the files / the whole sample, one process",
            decoding_share(data, 64 if quick else 640, 4 if quick else 40),
            unit="of its processor time",
            note="the rest (warps, color, mixup, boxes) is the most that a GPU could take over",
        )
        for workers in [1] if quick else counts(cores) if between else sorted({1, cores}):
            loader = train_loader(
                data, imgsz=64 if quick else 640, batch=BATCH, augment=Augment(), seed=0, workers=workers
            )
            rate = Spread.of(rates(loader, 2, 0.05) if quick else rates(loader, 5, 2.0))
            one = one or rate.median
            note = f"{rate.median / workers:.0f} a process, {rate.median / workers / one:.2f} of one alone"
            yield Row(
                f"{workers} of {cores} cores",
                rate,
                at_least=GOAL if workers >= 16 else None,
                unit="images/s",
                note=note,
            )


if __name__ == "__main__":
    run_script("loading", TITLE, measure)
