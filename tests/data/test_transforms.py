"""Letterbox, color, flip and affine maps: pixels and boxes go the same way."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yoloxkd.config.augment import Augment
from yoloxkd.data.augment.transforms import (
    affine_of_mosaic,
    blank,
    color,
    flip,
    letterbox,
    shift_hsv,
    worth_training,
)

PAD = (10, 20, 30)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (max(1, height // 6), max(1, width // 6), 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([(64, 64), (64, 96), (96, 32)]))
def test_letterbox_is_yolox_s_rule(height: int, width: int, size: tuple[int, int]) -> None:
    image = noise(height, width)
    out, scale, left, top = letterbox(image, size, PAD)
    ratio = min(size[0] / height, size[1] / width)
    new_h, new_w = max(1, int(height * ratio)), max(1, int(width * ratio))
    assert (out.shape, out.dtype) == ((*size, 3), np.uint8)
    assert (scale, left, top) == (ratio, 0, 0)
    np.testing.assert_array_equal(out[:new_h, :new_w], cv2.resize(image, (new_w, new_h)))
    assert (out[new_h:] == PAD).all()
    assert (out[:, new_w:] == PAD).all()


def test_letterbox_can_be_undone() -> None:
    """A box painted into the image, found again in the input, comes back by the given numbers."""
    image = np.zeros((90, 160, 3), np.uint8)
    image[20:60, 40:120] = 255
    out, scale, left, top = letterbox(image, (64, 64), (0, 0, 0))
    rows, columns = (np.flatnonzero((out[..., 0] > 127).any(axis)) for axis in (1, 0))
    found = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    back = (found - [left, top, left, top]) / scale
    assert np.abs(back - [40, 20, 120, 60]).max() <= 1 / scale


def test_letterbox_leaves_its_input_alone() -> None:
    image = noise(32, 32)
    out, *_ = letterbox(image, (32, 32), PAD)
    out[:] = 0
    assert image.any()


def test_blank_has_one_color() -> None:
    assert (blank((5, 7), PAD) == PAD).all()
    assert blank((5, 7), PAD).shape == (5, 7, 3)


def slow_shift(image: np.ndarray, hue: int, saturation: int, value: int) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)
    h = (hsv[..., 0] + hue) % 180
    s, v = np.clip(hsv[..., 1] + saturation, 0, 255), np.clip(hsv[..., 2] + value, 0, 255)
    return cv2.cvtColor(np.stack([h, s, v], -1).astype(np.uint8), cv2.COLOR_HSV2RGB)


@pytest.mark.parametrize("shift", [(5, 30, 30), (-5, -30, -30), (75, 0, 0), (-75, 255, 0), (0, -7, 9), (3, 200, -200)])
def test_color_shift_is_cyclic_in_hue_and_saturates(shift: tuple[int, int, int]) -> None:
    image = noise(60, 60)
    ours, slow = shift_hsv(image, *shift).astype(int), slow_shift(image, *shift).astype(int)
    # hues are rounded to 2 degrees, differently when red and blue are exchanged: one step of hue, no more
    assert np.abs(ours - slow).max() <= 9
    assert np.abs(ours - slow).mean() < 0.2


def test_color_draws_from_the_generator_it_is_given() -> None:
    image = noise(40, 40)
    augment = Augment(gray=0.3, blur=0.5, noise=0.5)
    outs = [color(image, augment, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert len({out.tobytes() for out in outs}) == 4


@pytest.mark.parametrize("key", ["hsv_prob", "gray", "blur", "noise"])
def test_each_color_operation_does_something(key: str) -> None:
    image = noise(40, 40)
    none = Augment(hsv_prob=0.0)
    np.testing.assert_array_equal(color(image, none, np.random.default_rng(0)), image)
    changed = color(image, none.model_copy(update={key: 1.0}), np.random.default_rng(1))
    assert (changed != image).any()
    assert (changed.shape, changed.dtype) == (image.shape, np.uint8)
    if key == "gray":
        assert (np.ptp(changed, axis=-1) == 0).all()


def test_flip_mirrors_pixels_and_boxes() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[4:9, 3:13] = 255
    out, boxes = flip(image, np.array([[3.0, 4, 13, 9]]), 40)
    assert boxes.tolist() == [[27, 4, 37, 9]]
    assert (out[4:9, 27:37] == 255).all()
    assert (out > 0).sum() == (image > 0).sum()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_the_map_keeps_its_promises(seed: int) -> None:
    """Area scale within range, the canvas's center within `translate` of the input's center."""
    augment = Augment(degrees=30, shear=0, scale=(0.4, 1.6), translate=0.2)
    matrix = affine_of_mosaic(augment, (64, 96), np.random.default_rng(seed))
    scale = np.sqrt(np.linalg.det(matrix[:2, :2]))
    assert 0.4 <= scale <= 1.6
    angle = np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))
    assert abs(angle) <= 30 + 1e-9
    center = matrix @ (96, 64, 1)
    assert abs(center[0] / 96 - 0.5) <= 0.2 + 1e-9
    assert abs(center[1] / 64 - 0.5) <= 0.2 + 1e-9


def test_a_map_without_play_puts_the_center_in_the_center() -> None:
    still = Augment(degrees=0, shear=0, translate=0, scale=(0.5, 0.5))
    matrix = affine_of_mosaic(still, (64, 96), np.random.default_rng(0))
    np.testing.assert_allclose(matrix, [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]], atol=1e-12)


def test_which_clipped_boxes_are_kept() -> None:
    boxes = np.array([[-5.0, -5, 5, 5], [20, 20, 30, 30], [0, 0, 1.5, 9], [8.5, 0, 12, 40]])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    clipped = np.clip(boxes, 0, 10)
    assert worth_training(clipped, areas, np.zeros(4, bool)).tolist() == [True, False, False, False]
    assert worth_training(np.array([[0.0, 0, 3, 3]]), np.array([91.0]), np.zeros(1, bool)).tolist() == [False]
    assert worth_training(np.zeros((0, 4)), np.zeros(0), np.zeros(0, bool)).shape == (0,)
