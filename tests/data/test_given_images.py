"""What `Detector.predict` takes, and the one sentence for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from yoloxkd.data.io.given_images import given_images
from yoloxkd.errors import UserError

RGB = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
GRAY = RGB[..., 0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), RGB[..., ::-1])
    return path


def one(image: Any) -> np.ndarray:
    (picture,) = given_images(image)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous
    return picture


def test_all_that_is_one_image(file: Path) -> None:
    rgba = np.dstack([RGB, np.zeros_like(GRAY)])
    wide = np.zeros((6, 16, 3), np.uint8)
    wide[:, ::2] = RGB
    frozen = RGB.copy()
    frozen.flags.writeable = False
    same = [
        file, str(file), RGB, wide[:, ::2], frozen, RGB.astype(np.uint16) * 256 + 7, Image.fromarray(RGB),
        Image.fromarray(rgba), torch.from_numpy(RGB).permute(2, 0, 1),
        Image.open(file),
    ]  # fmt: skip
    for image in same:
        assert np.array_equal(one(image), RGB)
    gray = np.repeat(GRAY[..., None], 3, 2)
    sixteen = Image.fromarray(GRAY.astype(np.uint16) * 256)
    for image in (GRAY, GRAY[..., None], Image.fromarray(GRAY), torch.from_numpy(GRAY.copy())[None], sixteen):
        assert np.array_equal(one(image), gray)
    assert np.array_equal(one(Image.fromarray(RGB).convert("P").convert("RGB")), one(Image.fromarray(RGB).convert("P")))


def test_several_mixed_and_batched(file: Path) -> None:
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    for several in (
        [file, RGB, tensor],
        (x for x in (RGB, str(file), tensor)),
        np.stack([RGB] * 3),
        torch.stack([tensor] * 3),
    ):
        pictures = list(given_images(several))
        assert len(pictures) == 3
        assert all(np.array_equal(picture, RGB) for picture in pictures)
    assert list(given_images(np.array([str(file)]))) != []
    for nothing in ([], (), iter(()), np.zeros((0, 6, 8, 3), np.uint8)):
        assert list(given_images(nothing)) == []


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (None, ["the image is None", "cv2.imread"]),
        ([RGB, None], ["image 2 is None"]),
        (RGB / 255.0, ["float64", "(6, 8, 3)", "0..255"]),
        ([RGB, RGB.astype(np.float32)], ["image 2", "float32"]),
        (torch.zeros(3, 6, 8), ["tensor of float32", "(3, 6, 8)"]),
        (torch.zeros(6, 8, 3, dtype=torch.uint8), ["a tensor of uint8 and shape (6, 8, 3)"]),
        (RGB.transpose(2, 0, 1), ["uint8", "(3, 6, 8)"]),
        (np.dstack([RGB, GRAY]), ["uint8", "(6, 8, 4)"]),
        (RGB > 9, ["bool"]),
        (RGB.astype(np.int64), ["int64"]),
        (np.array([]), ["(0,)"]),
        (np.zeros((0, 8, 3), np.uint8), ["(0, 8, 3)"]),
        (np.zeros((2, 6, 8, 3), np.float32), ["image 1", "float32"]),
        (np.array(3), ["()"]),
        (7, ["of type int"]),
        (b"bytes", ["of type bytes"]),
        ({"image": RGB}, ["of type dict"]),
        ([[RGB]], ["image 1 is of type list"]),
        (["absent.png"], ["absent.png"]),
        (Image.new("F", (8, 6)), ["mode F"]),
        (Image.new("RGB", (0, 6)), ["0x6"]),
        (Image.fromarray(np.full((6, 8), 70_000, np.int32)), ["mode I", "65535"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) and isinstance(value[0], str) else "image",
)  # fmt: skip
def test_anything_else_is_one_sentence(images: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        list(given_images(images))
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
