"""Sheets of images."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.engine.scenes import scene
from yoloxkd.drawing import class_color
from yoloxkd.types import Detections
from yoloxkd.viz.contact_sheet import draw_comparison, truth_beside_prediction


def dets(*boxes: list[float]) -> Detections:
    return Detections(np.array(boxes, float).reshape(-1, 4), np.ones(len(boxes)), np.zeros(len(boxes), int), ["thing"])


@pytest.mark.parametrize(("count", "shape"), [(0, (116, 224)), (1, (116, 224)), (3, (232, 448)), (4, (232, 448))])
def test_pairs_make_a_full_sheet(count: int, shape: tuple[int, int]) -> None:
    images = [np.full((50 + 30 * i, 80, 3), 90, np.uint8) for i in range(count)]
    sheet = truth_beside_prediction(images, [dets([0, 0, 9, 9])] * count, [dets()] * count, cell=100)
    assert sheet.shape == (*shape, 3)
    assert sheet.dtype == np.uint8


def test_the_left_image_has_the_truth_and_the_right_the_prediction() -> None:
    image = np.full((100, 100, 3), 90, np.uint8)
    sheet = truth_beside_prediction([image], [dets([30, 30, 80, 80])], [dets()], cell=100)
    left, right = sheet[8:108, 8:108], sheet[8:108, 116:216]
    assert (left != 90).any()
    assert (right == 90).all()


def test_a_comparison_draws_what_a_predictor_finds_where_it_is(tmp_path: Path) -> None:
    data = scene(tmp_path, images=1, size=(100, 200))

    class Finder:
        """Finds one box: the lower right quarter of the image, in px of the letterboxed input."""

        names, stride, pad_value = ["red", "blue"], 8, (114, 114, 114)

        def __call__(self, images: torch.Tensor) -> list[Detections]:
            assert images.shape == (1, 3, 64, 64)
            return [Detections(np.array([[32.0, 16, 63, 31]]), np.array([0.9]), np.array([1]), self.names)]

    path = draw_comparison(Finder(), data, [0], 64, tmp_path / "sheet.png", cell=200)
    sheet = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert sheet.shape == (216, 424, 3)
    prediction = sheet[8:208, 216:416]
    blue = (prediction == class_color(1)).all(axis=2)
    rows, columns = np.nonzero(blue)
    # the image is 200 x 100 px in the middle of the cell; its lower right quarter begins at (100, 100)
    assert abs(columns.min() - 100) <= 2
    assert rows.max() <= 150
    assert columns.max() <= 200
