"""The built-in data sets `shapes` and `shapes-easy`: images of colored shapes, drawn on first use, always the same."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from yoloxkd.cache_folders import find_cached, make_cache_folder
from yoloxkd.data.shape_outlines import OUTLINES
from yoloxkd.errors import UserError
from yoloxkd.instance_masks import encode_rle
from yoloxkd.write_image import write_image

SHAPES = "shapes"
VERSION = 3
SIDE = 320
_DRAWING = 2  # the first version whose images are the same
CLASSES = tuple(OUTLINES)
COUNTS: Mapping[str, int] = {"train": 800, "val": 150, "test": 150}
# An object is annotated when at least this part of it can be seen.
_VISIBLE = 0.25
_SPLIT_SEEDS = {"train": 1, "val": 2, "test": 3}


class Level(NamedTuple):
    """How hard the images are: classes in label order, smallest and largest side (px), most objects, background clutter."""

    classes: tuple[str, ...]
    sides: tuple[float, float]
    most: int
    clutter: bool


HARD = Level(CLASSES, (10.0, 0.62 * SIDE), 20, True)
EASY = Level(("circle", "square", "triangle", "star", "cross", "heart"), (0.2 * SIDE, 0.45 * SIDE), 5, False)
LEVELS: Mapping[str, Level] = {SHAPES: HARD, f"{SHAPES}-easy": EASY}


class Shape(NamedTuple):
    """An object that can be seen: its class, [x, y, width, height] px, and its mask as COCO's compressed run lengths."""

    label: int
    box: list[int]
    counts: bytes


def shapes_folder(name: str = SHAPES) -> Path:
    """The folder of a data set of LEVELS, drawn if it is not there yet: <name>-<version> in the cache folder."""
    folder = find_cached(f"{name}-{VERSION}")
    if not folder.is_dir():
        folder = make_cache_folder() / folder.name
        try:
            generate(folder, COUNTS, LEVELS[name])
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write the data set '{name}' to {folder}: {reason}; set YOLOXKD_HOME") from error
    return folder


def generate(folder: Path, counts: Mapping[str, int], level: Level = HARD) -> None:
    """Draw `counts` images a split into `folder`, as JPEG files with COCO annotations.

    An image depends on its split and number alone. The folder appears whole or not at all; when another process has
    made it meanwhile, that one stays.
    """
    parent = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    work = parent / folder.name
    total, done = sum(counts.values()), 0
    _progress(folder, done, total)
    try:
        for split, count in counts.items():
            (work / "images" / split).mkdir(parents=True)
            records = []
            with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
                for number, rows in enumerate(pool.map(lambda n, s=split: _write(work, s, n, level), range(count))):
                    records.append((number, rows))
                    done += 1
                    if done % 50 == 0 or done == total:
                        _progress(folder, done, total)
            (work / "annotations").mkdir(exist_ok=True)
            (work / "annotations" / f"{split}.json").write_text(json.dumps(_coco(split, records, level)))
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _progress(folder: Path, done: int, total: int) -> None:
    """One line on a terminal, rewritten as it goes; elsewhere a line at the start and one at the end."""
    text = f"drawing the data set '{folder.name.rsplit('-', 1)[0]}' into {folder}: {done} of {total}"
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done in (0, total):
        print(text, file=sys.stderr, flush=True)


def _write(work: Path, split: str, number: int, level: Level) -> list[Shape]:
    image, objects = draw(split, number, level)
    file = work / "images" / split / f"{number:05d}.jpg"
    write_image(file, image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return objects


def _coco(split: str, records: list[tuple[int, list[Shape]]], level: Level) -> dict[str, Any]:
    first = _SPLIT_SEEDS[split] * 1_000_000
    images = [{"id": first + n, "file_name": f"{n:05d}.jpg", "height": SIDE, "width": SIDE} for n, _ in records]
    rows = [(first + n, one) for n, objects in records for one in objects]
    annotations = [
        {
            "id": i,
            "image_id": n,
            "category_id": one.label + 1,
            "bbox": one.box,
            "area": one.box[2] * one.box[3],
            "iscrowd": 0,
            "segmentation": {"size": [SIDE, SIDE], "counts": one.counts.decode()},
        }
        for i, (n, one) in enumerate(rows, start=1)
    ]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(level.classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw(split: str, number: int, level: Level = HARD) -> tuple[np.ndarray, list[Shape]]:
    """One image: uint8 (SIDE, SIDE, 3) RGB, and every object that can be seen.

    Mask and box hold exactly the pixels that the object would show with nothing in front of it.
    """
    rng = np.random.default_rng((_DRAWING, _SPLIT_SEEDS[split], number))
    canvas = _background(rng, level)
    owner = np.zeros((SIDE, SIDE), np.uint8)
    placed: list[tuple[Shape, int]] = []
    for label, radius in _plan(rng, level):
        center = _free_place(rng, owner, radius, level)
        mask, left, top = _mask(rng, level.classes[label], center, radius)
        solid = mask > 127
        columns, rows = np.flatnonzero(solid.any(0)), np.flatnonzero(solid.any(1))
        if not len(columns) or len(placed) >= 255:
            continue
        box = [left + int(columns[0]), top + int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        view = (slice(top, top + mask.shape[0]), slice(left, left + mask.shape[1]))
        _paint(rng, canvas[view], mask, label, len(level.classes))
        whole = np.zeros((SIDE, SIDE), bool)
        whole[view] = solid
        placed.append((Shape(label, box, encode_rle(whole)), int(solid.sum())))
        owner[view][solid] = len(placed)
    visible_areas = np.bincount(owner.ravel(), minlength=len(placed) + 1)[1:]
    objects = [
        one
        for (one, area), n in zip(placed, visible_areas, strict=True)
        if n >= _VISIBLE * area and min(one.box[2:]) >= 4
    ]
    return _finish(rng, canvas), objects


def _plan(rng: np.random.Generator, level: Level) -> list[tuple[int, float]]:
    """Label and radius of each object in drawing order: mostly large ones first, so that they do not bury the small."""
    many = level.clutter and rng.random() < 0.5
    count = int(rng.integers(0, level.most + 1)) if many else int(rng.integers(1, min(8, level.most + 1)))
    smallest, largest = level.sides
    if count > 5:
        largest = max(32.0, 1.3 * SIDE / np.sqrt(count))
    sides = np.exp(rng.uniform(np.log(smallest), np.log(largest), count))
    order = np.argsort(-sides * rng.uniform(0.5, 2.0, count))
    labels = rng.integers(0, len(level.classes), count)
    return [(int(labels[i]), float(sides[i]) / 2) for i in order]


def _free_place(rng: np.random.Generator, owner: np.ndarray, radius: float, level: Level) -> tuple[float, float]:
    """A center: of a few drawn, the one whose surroundings are least covered, so that occlusion is not the rule."""
    margin = min(0.6 * radius, SIDE / 2 - 1)
    tried = rng.uniform(margin, SIDE - margin, (int(rng.integers(1, 5)) if level.clutter else 16, 2))

    def coverage(center: np.ndarray) -> float:
        (left, top), (right, bottom) = np.maximum(center - radius, 0).astype(int), (center + radius).astype(int) + 1
        return float((owner[top:bottom, left:right] > 0).mean())

    best = min(tried, key=coverage)
    return float(best[0]), float(best[1])


def _mask(
    rng: np.random.Generator, name: str, center: tuple[float, float], radius: float
) -> tuple[np.ndarray, int, int]:
    """Coverage 0..255 of a turned, slightly stretched shape, cut at the image's border; its left and top pixel."""
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.0)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = [radius * (contour * (1.0, stretch)) @ turn.T + center for contour in OUTLINES[name]]
    reach = radius + 2
    left, top = (max(0, int(c - reach)) for c in center)
    right, bottom = (min(SIDE, int(c + reach) + 1) for c in center)
    mask = np.zeros((bottom - top, right - left), np.uint8)
    fixed = [np.round((p - (left + 0.5, top + 0.5)) * 16).astype(np.int32) for p in points]
    cv2.fillPoly(mask, fixed, 255, cv2.LINE_AA, 4)
    return mask, left, top


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, label: int, classes: int) -> None:
    """Color the masked pixels of a view so that they stand out from what is there, shaded, sometimes striped."""
    height, width = mask.shape
    under = np.array(cv2.mean(canvas)[:3])
    colors = _colors(rng, 6, label, classes)
    distance = np.abs(colors - under).sum(1)
    color = colors[int(np.argmax(distance >= 110))] if (distance >= 110).any() else colors[int(distance.argmax())]
    across, down = np.meshgrid(
        np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)
    )
    angle = np.float32(rng.uniform(0, 2 * np.pi))
    along = across * np.cos(angle) + down * np.sin(angle)
    shade = 1 + np.float32(rng.uniform(0, 0.25)) * along
    if rng.random() < 0.3:
        shade = shade + np.float32(rng.uniform(0.08, 0.2)) * np.sign(np.sin(along * np.float32(rng.uniform(4, 12))))
    fill = color * shade[..., None]
    part = (mask.astype(np.float32) / 255 * np.float32(rng.uniform(0.85, 1.0)))[..., None]
    canvas[...] = canvas * (1 - part) + fill * part


def _colors(rng: np.random.Generator, count: int, label: int, classes: int) -> np.ndarray:
    """(count, 3) float RGB 0..255, mostly bright, of about the class's own hue.

    Hues of neighboring classes overlap (a standard deviation is half their distance), so color helps a detector that is
    trained for minutes to tell classes apart, and only the outline tells them apart for certain.
    """
    apart = 180 / classes
    hue = rng.normal(apart * label, apart / 2, count) % 180
    hsv = np.stack([hue, rng.uniform(90, 255, count), rng.uniform(80, 255, count)], -1)
    return np.asarray(cv2.cvtColor(hsv.astype(np.uint8)[None], cv2.COLOR_HSV2RGB)[0], np.float32)


def _background(rng: np.random.Generator, level: Level) -> np.ndarray:
    """(SIDE, SIDE, 3) float32: colored noise of several grain sizes, a slope of light, and unlabelled clutter or none."""
    half = SIDE // 2  # noise this coarse loses nothing by being drawn at half size
    canvas = np.full((half, half, 3), rng.uniform(50, 200, 3), np.float32)
    for grain in (3, 8, 24, 80) if level.clutter else (3,):
        noise = rng.standard_normal((grain, grain, 3 if rng.random() < 0.4 else 1), np.float32)
        noise *= np.float32(rng.uniform(2, 16))
        canvas += cv2.resize(noise, (half, half), interpolation=cv2.INTER_CUBIC).reshape(half, half, -1)
    slope = np.linspace(-1, 1, half, dtype=np.float32) * np.float32(rng.uniform(-30, 30))
    canvas += slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None]
    canvas = np.asarray(cv2.resize(canvas, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR))
    mean = np.array(cv2.mean(canvas)[:3])
    for _ in range(int(rng.integers(0, 10)) if level.clutter else 0):
        start, end = rng.integers(-20, SIDE + 20, (2, 2))
        color = (mean + rng.uniform(-50, 50, 3)).tolist()
        if rng.random() < 0.6:
            cv2.line(canvas, start.tolist(), end.tolist(), color, int(rng.integers(1, 4)), cv2.LINE_AA)
        else:
            axes, first = rng.integers(8, 60, 2).tolist(), float(rng.uniform(0, 360))
            cv2.ellipse(
                canvas, start.tolist(), axes, 0, first, first + float(rng.uniform(40, 200)), color, 2, cv2.LINE_AA
            )
    return canvas


def _finish(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """The camera's part: sometimes a little blur, always a little noise; uint8."""
    if rng.random() < 0.4:
        canvas = cv2.GaussianBlur(canvas, (3, 3), float(rng.uniform(0.3, 0.9)))
    grain = rng.standard_normal((SIDE, SIDE, 1), np.float32) * np.float32(rng.uniform(1, 6))
    return np.asarray(np.clip(canvas + grain, 0, 255), np.uint8)
