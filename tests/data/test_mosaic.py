"""Mosaic and mixup: boxes follow the pixels they were drawn around, at every scale, turn and cut."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.mosaic import Boxes, Tile, boxes_of, draw, mixup, mosaic, new_canvas
from yoloxkd.data.augment.transforms import Sample, blank, worth_training
from yoloxkd.data.dataset import DetectionData
from yoloxkd.types import ImageMeta

BLACK = (0, 0, 0)
SIZES = [(120, 160), (150, 90), (101, 203), (64, 64)]
BOXES = [(30, 40, 110, 100), (20, 30, 70, 120), (50, 10, 153, 90), (8, 8, 40, 56)]


def painted(folder: Path, suffix: str, order: tuple[int, ...] = (0, 1, 2, 3)) -> DetectionData:
    """Black images with one box each, its inside painted in a gray of its own."""
    paths = []
    for k in order:
        image = np.zeros((*SIZES[k], 3), np.uint8)
        x1, y1, x2, y2 = BOXES[k]
        image[y1:y2, x1:x2] = 100 + 50 * k
        paths.append(str(folder / f"{k}{suffix}"))
        assert cv2.imwrite(paths[-1], image, [cv2.IMWRITE_JPEG_QUALITY, 100] if suffix == ".jpg" else [])
    n = len(order)
    return DetectionData(
        names=["a", "b", "c", "d"],
        split="train",
        image_ids=np.arange(n),
        paths=paths,
        sizes=np.array([SIZES[k] for k in order], np.int32),
        boxes=np.array([BOXES[k] for k in order], np.float32),
        labels=np.array(order),
        crowd=np.zeros(n, bool),
        areas=np.ones(n),
        annotation_ids=np.arange(1, n + 1),
        offsets=np.arange(n + 1),
    )


def paste(
    data: DetectionData, index: int, matrix: np.ndarray, canvas: np.ndarray, cut: tuple[float, float, float, float]
) -> Boxes:
    """Draws one image, and gives its boxes."""
    tile = Tile(index, tuple(map(tuple, matrix[:2].tolist())), cut, 1.0)
    draw(data, tile, canvas)
    return boxes_of(data, [tile], canvas.shape[:2])


def extent(image: np.ndarray, level: float) -> np.ndarray:
    shown = image[..., 0] > level
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


MAPS = {
    "as it is": (1.0, 0.0, (0, 0)),
    "moved by half pixels": (1.0, 0.0, (10.5, 3.5)),
    "enlarged": (2.3, 0.0, (-40, -60)),
    "halved": (0.5, 0.0, (3, 5)),
    "at a third": (0.33, 0.0, (20.2, 8)),
    "at a fifth": (0.2, 0.0, (50, 50)),
    "at an eighth": (0.12, 0.0, (11, 22)),
    "turned": (0.9, 17.0, (30, 10)),
    "turned and small": (0.3, -25.0, (40, 60)),
    "turned and large": (1.6, 8.0, (-20, 30)),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("name", list(MAPS))
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_pasted_box_lies_where_its_pixels_are(tmp_path: Path, name: str, suffix: str, index: int) -> None:
    data = painted(tmp_path, suffix)
    scale, degrees, (left, top) = MAPS[name]
    c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    matrix = np.array([[c, s, left], [-s, c, top], [0, 0, 1]])
    canvas = new_canvas((240, 300), BLACK)
    height, width = SIZES[index]
    boxes, labels, *_ = paste(data, index, matrix, canvas, (0, 0, width, height))
    assert labels.tolist() == [index]
    # a pixel counts as painted from half its gray on; sharp corners of turned boxes lose a little more
    tolerance = 1.0 if degrees == 0 else 2.0
    assert np.abs(extent(canvas, (100 + 50 * index) / 2) - boxes[0]).max() <= tolerance


def test_a_cut_limits_pixels_and_boxes(tmp_path: Path) -> None:
    data = painted(tmp_path, ".png")
    canvas = new_canvas((160, 192), BLACK)
    boxes, *_ = paste(data, 0, np.eye(3), canvas, (60, 0, 160, 70))
    assert boxes.tolist() == [[60, 40, 110, 70]]
    assert np.abs(extent(canvas, 50) - (60, 40, 110, 70)).max() <= 1
    boxes, *_ = paste(data, 0, np.eye(3), canvas, (0, 0, 25, 120))
    assert boxes.shape == (0, 4)


def test_a_image_out_of_sight_is_not_even_read(tmp_path: Path) -> None:
    data = painted(tmp_path, ".png")
    Path(data.paths[0]).unlink()
    canvas = new_canvas((50, 50), BLACK)
    away = np.array([[1.0, 0, 60], [0, 1, 0], [0, 0, 1]])
    boxes, labels, crowd, *_ = paste(data, 0, away, canvas, (0, 0, 160, 120))
    assert (boxes.shape, labels.shape, crowd.shape) == ((0, 4), (0,), (0,))
    assert not canvas[..., :3].any()


STILL = Augment(degrees=0, shear=0, translate=0, scale=(0.5, 0.5))


@pytest.mark.parametrize("seed", range(5))
def test_four_images_meet_and_every_box_is_found(tmp_path: Path, seed: int) -> None:
    """Without turn or play the input shows the whole canvas: boxes of one gray each, where their pixels are."""
    data = painted(tmp_path, ".png")
    sample = mosaic(data, [0, 1, 2, 3], (128, 128), STILL, BLACK, np.random.default_rng(seed))
    assert sample.image.shape == (128, 128, 3)
    assert sample.content.tolist() == [0, 0, 128, 128]
    assert (sample.meta.image_id, math.isnan(sample.meta.scale)) == (0, True)
    assert len(sample.labels) >= 2
    for box, label in zip(sample.boxes, sample.labels, strict=True):
        inside = sample.image[math.ceil(box[1]) + 1 : int(box[3]) - 1, math.ceil(box[0]) + 1 : int(box[2]) - 1, 0]
        assert np.abs(inside.astype(int) - (100 + 50 * label)).max(initial=0) <= 2
    covered = np.zeros((128, 128), bool)
    for x1, y1, x2, y2 in sample.boxes:
        covered[max(0, int(y1) - 1) : math.ceil(y2) + 1, max(0, int(x1) - 1) : math.ceil(x2) + 1] = True
    outside = np.where(covered, 0, sample.image[..., 0])
    assert (outside > 50).sum() <= 40  # slivers of boxes cut too small to be kept


def test_padding_has_the_pad_value(tmp_path: Path) -> None:
    small = STILL.model_copy(update={"scale": (0.1, 0.1)})
    sample = mosaic(painted(tmp_path, ".png"), [0, 1, 2, 3], (128, 128), small, (7, 8, 9), np.random.default_rng(0))
    assert (sample.image[:40] == (7, 8, 9)).all()
    assert (sample.image[:, -40:] == (7, 8, 9)).all()
    assert (sample.image != (7, 8, 9)).any()


def test_boxes_stay_in_the_input_and_are_worth_training(tmp_path: Path) -> None:
    data = painted(tmp_path, ".jpg")
    for seed in range(30):
        sample = mosaic(data, [0, 1, 2, 3], (96, 128), Augment(), BLACK, np.random.default_rng(seed))
        assert sample.boxes.dtype == np.float32
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= (128, 96, 128, 96)).all()
        assert ((sample.boxes[:, 2:] - sample.boxes[:, :2]) > 2).all()
        assert len(sample.boxes) == len(sample.labels) == len(sample.crowd)


def test_crowd_regions_stay_crowd(tmp_path: Path) -> None:
    data = painted(tmp_path, ".png")
    data.crowd[1] = True
    sample = mosaic(data, [0, 1, 2, 3], (128, 128), STILL, BLACK, np.random.default_rng(1))
    assert (sample.crowd == (sample.labels == 1)).all()


@pytest.mark.parametrize("seed", range(6))
def test_mixup_is_half_and_half_with_the_boxes_of_both(tmp_path: Path, seed: int) -> None:
    data = painted(tmp_path, ".png")
    base = Sample(
        blank((128, 128), (60, 60, 60)),
        np.array([[1, 2, 30, 40]], np.float32),
        np.array([3]),
        np.array([True]),
        np.array([0, 0, 128, 128], np.float32),
        ImageMeta(5, "x", 128, 128),
    )
    mixed = mixup(base, data, 0, Augment(mosaic=1), BLACK, np.random.default_rng(seed))
    assert mixed.labels.tolist() == [3, 0]
    assert mixed.crowd.tolist() == [True, False]
    assert mixed.meta is base.meta
    assert (base.image == 60).all()
    assert set(np.unique(mixed.image)) <= set(range(30, 81))
    other = mixed.image.astype(int) - 30  # half of the painted gray is 50
    assert np.abs(extent(other, 25) - mixed.boxes[1]).max() <= 1.0


def test_a_cut_ignore_region_stays_one_while_any_of_it_shows(tmp_path: Path) -> None:
    """An object of which a twentieth is left is dropped; of a region to ignore that part would become background."""
    boxes = np.array([[0.0, 0, 5, 100], [0.0, 0, 1, 100]])
    whole = np.array([10_000.0, 10_000.0])
    assert worth_training(boxes, whole, np.array([False, False])).tolist() == [False, False]
    assert worth_training(boxes, whole, np.array([True, True])).tolist() == [True, True]
    assert worth_training(boxes * 0, whole, np.array([True, True])).tolist() == [False, False]
