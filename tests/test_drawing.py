"""Boxes on images."""

from __future__ import annotations

import numpy as np
import pytest

from yoloxkd.drawing import class_color
from yoloxkd.types import Detections

NAMES = ["cat", "dog"]


def one(box: list[float], label: int = 0) -> Detections:
    return Detections(np.array([box]), np.array([0.87]), np.array([label]), NAMES)


def test_the_image_given_is_not_drawn_on() -> None:
    image = np.full((120, 160, 3), 200, np.uint8)
    drawn = one([20, 40, 100, 100]).plot(image)
    assert (image == 200).all()
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8


def test_the_edge_has_the_color_of_the_class_and_the_inside_stays() -> None:
    image = np.full((300, 300, 3), 200, np.uint8)
    drawn = one([50, 100, 200, 250], label=1).plot(image)
    assert tuple(drawn[250, 120]) == class_color(1)
    assert tuple(drawn[180, 50]) == class_color(1)
    assert (drawn[180, 125] == 200).all()


@pytest.mark.parametrize("size", [(8, 8), (40, 1500), (1500, 40), (2000, 2000)])
def test_any_size_of_image_and_boxes_beyond_it(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    drawn = one([-500, -500, 9000, 9000]).plot(image)
    assert drawn.shape == image.shape
    assert drawn.any()


def test_lines_grow_with_the_image() -> None:
    thickness = []
    for side in (200, 2000):
        box = [side * 0.3, side * 0.3, side * 0.9, side * 0.9]
        drawn = one(box).plot(np.zeros((side, side, 3), np.uint8))
        thickness.append(int(drawn[int(side * 0.6), : side // 2].any(axis=1).sum()))
    assert thickness[1] > 2 * thickness[0]


def test_colors_of_eighty_classes_differ() -> None:
    assert len({class_color(k) for k in range(80)}) == 80


def test_no_detections_change_nothing() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), NAMES)
    assert np.array_equal(nothing.plot(image), image)
