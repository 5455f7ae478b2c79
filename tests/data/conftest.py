"""A small data set on disk: three images, one without a box, sparse category ids, a crowd region."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

NAMES = ["cat", "dog"]
CONTENT: dict[str, Any] = {
    "images": [
        {"id": 30, "file_name": "a.jpg", "height": 48, "width": 64},
        {"id": 10, "file_name": "b.png", "height": 40, "width": 40},
        {"id": 20, "file_name": "c.jpg", "height": 64, "width": 32},
    ],
    "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
    "annotations": [
        {"id": 7, "image_id": 20, "category_id": 3, "bbox": [2, 4, 10, 20], "area": 150.5, "iscrowd": 0},
        {"id": 5, "image_id": 30, "category_id": 90, "bbox": [10.5, 8, 20, 16], "area": 320, "iscrowd": 0},
        {"id": 9, "image_id": 20, "category_id": 90, "bbox": [0, 0, 32, 64], "area": 900, "iscrowd": 1},
    ],
}

MakeSet = Callable[..., tuple[Path, Path]]


@pytest.fixture
def content() -> dict[str, Any]:
    """The annotations of the small set, free to be spoilt."""
    return copy.deepcopy(CONTENT)


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """make_set(content) writes images and annotations, and gives (images folder, annotation file)."""

    def make(content: dict[str, Any] = CONTENT) -> tuple[Path, Path]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for image in CONTENT["images"]:
            coarse = rng.integers(0, 256, (image["height"] // 8, image["width"] // 8, 3), np.uint8)
            picture = cv2.resize(coarse, (image["width"], image["height"]))
            assert cv2.imwrite(str(folder / image["file_name"]), picture)
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        return folder, file

    return make
