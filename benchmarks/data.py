"""Training images: our mosaic against those of pixeltable-yolox and ultralytics, from JPEG files to arrays, one process.

Ours and pixeltable-yolox's mosaics decode their four images. Those of ultralytics take three from the last 128, still in
memory, as ours can from the 64 before them (`augment.mosaic_pool`). Both ways are measured of both, like against like. Images per CPU-second: other programs on the machine change it less than wall time.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.peers import use_peers
from benchmarks.report import FOLDER, Row, run_script, table
from benchmarks.run import machine
from benchmarks.timing import Samples, Turn, alternate, ratio
from yoloxkd.config.augment import Augment
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.data.loader import train_loader
from yoloxkd.errors import UserError
from yoloxkd.types import Batch

BCCD = Path(os.environ.get("YOLOXKD_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "bccd"
NAMES = ["RBC", "WBC", "Platelets"]
AFFINE = Augment(scale=(0.5, 1.5))  # the range that both peers' smaller recipes have; the rest is YOLOX's
GOAL = 1.3
RESULTS = Path(__file__).parent / "results" / "data.md"
TITLE = "Training images, 640x480 JPEG to mosaic, affine, color, flip: images per CPU-second, one process"
RULES = """Written by `python -m benchmarks.data`. The sides take turns of 40 images in one process; a number is the median of the
paired ratios of CPU time with its quartiles, and beside it are the medians of each side with lowest and highest. All have
mosaics always, the same ranges of affine, no mixup; color as each does it. OpenCV runs on one thread. "All four
read": no decoded image is taken from memory, as ours and pixeltable-yolox by default. ultralytics as it comes takes three of
four from the last 128; ours with `augment.mosaic_pool=64` from the last 64 (96 kept). BCCD has 205 images."""

PAIRS = (
    ("ours", "pixeltable-yolox"),
    ("ours", "ultralytics, all four read"),
    ("ours, mosaic_pool=64", "ultralytics"),
)

Draw = Callable[[int], object]
"""A training image by index, every time a new one."""


def ours(data: DetectionData, size: int, pool: int, images: int) -> Turn:
    """Batches of `images` as a run trains on them: epoch after epoch, in the epochs' own order."""
    augment = AFFINE.model_copy(update={"mosaic_pool": pool})
    loader = train_loader(data, imgsz=size, batch=images, augment=augment, seed=0)

    def batches() -> Iterator[Batch]:
        for epoch in range(sys.maxsize):
            loader.set_epoch(epoch)
            yield from loader

    return partial(next, batches())


def megvii(data: DetectionData, size: int) -> Draw:
    """The release's mosaic and transform, with the ranges of AFFINE and without mixup."""
    from yolox.data import MosaicDetection, TrainTransform
    from yolox.data.datasets import CocoDataset

    read = CocoDataset(str(BCCD), "train.json", "images/train", (size, size))
    samples = MosaicDetection(
        read,
        img_size=(size, size),
        preproc=TrainTransform(max_labels=120, flip_prob=AFFINE.flip, hsv_prob=AFFINE.hsv_prob),
        degrees=AFFINE.degrees,
        translate=AFFINE.translate,
        mosaic_scale=AFFINE.scale,
        shear=AFFINE.shear,
        enable_mixup=False,
    )
    return lambda index: samples[index]


def ultralytics(folder: Path, size: int, *, buffer: bool) -> Draw:
    """Its training set with the ranges of AFFINE, without albumentations, which add blur and the like.

    As it comes, it keeps the last 128 decoded images in memory, and a mosaic takes three of its four from there;
    `buffer` False: it keeps none, and all four are read.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data import YOLODataset

    low, high = AFFINE.scale
    keys = {"degrees": AFFINE.degrees, "translate": AFFINE.translate, "shear": AFFINE.shear, "fliplr": AFFINE.flip}
    keys |= {"scale": (high - low) / 2, "mixup": 0.0, "augmentations": []}
    hyp = get_cfg(overrides=keys)
    samples = YOLODataset(
        img_path=str(folder / "images"), imgsz=size, augment=True, hyp=hyp, batch_size=16,
        data={"names": dict(enumerate(NAMES)), "channels": 3},
    )  # fmt: skip
    steps = samples.transforms.transforms
    samples.transforms.transforms = [t for t in steps if type(t).__name__ != "Albumentations"]
    if buffer:
        for index in range(len(samples)):  # as it is after the first batches
            samples.load_image(index)
        return lambda index: samples[index]
    return without_buffer(samples)


def without_buffer(samples: Any) -> Draw:
    def draw(index: int) -> object:
        samples.buffer = random.choices(range(len(samples)), k=64)  # what the mosaic chooses from
        found = samples[index]
        for kept in [i for i, image in enumerate(samples.ims) if image is not None]:
            samples.ims[kept] = None
        return found

    return draw


def as_ultralytics(data: DetectionData, folder: Path) -> Path:
    """The same images (links) with labels as ultralytics reads them."""
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for index, path in enumerate(data.paths):
        os.symlink(Path(path).resolve(), folder / "images" / Path(path).name)
        height, width = data.sizes[index].tolist()
        boxes, labels, _ = data.annotations(index)
        center, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        rows = np.concatenate([center, side], 1) / [width, height, width, height]
        lines = [f"{k} {' '.join(f'{v:.6f}' for v in row)}" for k, row in zip(labels, rows, strict=True)]
        (folder / "labels" / f"{Path(path).stem}.txt").write_text("\n".join(lines))
    return folder


def turn(draw: Draw, n: int, images: int) -> Turn:
    """Draws `n` images of a split of `images`, each turn the next ones."""
    order = iter(np.random.default_rng(0).permutation(np.tile(np.arange(images), 1000)).tolist())

    def run() -> None:
        for _ in range(n):
            draw(next(order))

    return run


def rate(samples: Samples, n: int) -> str:
    """Median images per CPU-second, lowest and highest."""
    rates = [n / seconds for seconds in samples.cpu]
    return f"{np.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def measure(quick: bool) -> Iterator[Row]:
    if not BCCD.is_dir():
        raise UserError(f"the BCCD images are not at {BCCD}; set YOLOXKD_SHARED to the folder that has data/bccd")
    use_peers()
    cv2.setNumThreads(0)
    random.seed(0)
    data = read_coco(BCCD / "images/train", BCCD / "annotations/train.json", NAMES, "train")
    with tempfile.TemporaryDirectory() as folder:
        linked = as_ultralytics(data, Path(folder))
        for size in (320, 640):
            n = 2 if quick else 40
            turns: dict[str, Turn] = {
                "ours": ours(data, size, 0, n),
                "pixeltable-yolox": turn(megvii(data, size), n, len(data)),
                "ultralytics": turn(ultralytics(linked, size, buffer=True), n, len(data)),
                "ours, mosaic_pool=64": ours(data, size, 64, n),
                "ultralytics, all four read": turn(ultralytics(linked, size, buffer=False), n, len(data)),
            }
            found = alternate(turns, rounds=1 if quick else 15)
            for our_side, their_side in PAIRS:
                _, cpu = ratio(found[their_side], found[our_side])
                note = f"{rate(found[our_side], n)} / {rate(found[their_side], n)}"
                yield Row(f"{our_side} / {their_side}, {size} px", cpu, at_least=GOAL, note=note)


def write_results() -> None:
    """results/data.md from the rows of the last run, unless that was a smoke test."""
    kept = json.loads((FOLDER / "data.json").read_text())
    if kept["quick"]:
        return
    lines = [f"# {kept['title']}", "", *(f"* {line}" for line in machine()), "", RULES, "", table(kept["rows"])]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run_script("data", TITLE, measure)
    write_results()
