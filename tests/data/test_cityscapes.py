"""Cityscapes' polygons, from a generated set in its own folder layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.formats.cityscapes import CLASSES
from yoloxkd.errors import UserError
from yoloxkd.instance_masks import decode_rle

H, W = 64, 128
OBJECTS: list[dict[str, Any]] = [
    {"label": "road", "polygon": [[0, 0], [127, 0], [127, 63], [0, 63]]},
    {"label": "car", "polygon": [[10, 10], [49, 10], [49, 39], [10, 39]]},
    {"label": "cargroup", "polygon": [[60, 10], [99, 10], [99, 29], [60, 29]]},
    {"label": "person", "polygon": [[12, 12], [19, 12], [19, 19], [12, 19]]},
    {"label": "pole", "polygon": [[40, 0], [60, 0], [60, 63], [40, 63]]},
    {"label": "bicycle", "polygon": [[42, 5], [44, 5]]},
    {"label": "rider", "polygon": [[1, 50], [8, 50], [8, 60], [1, 60]], "deleted": 1},
    {"label": "license plate", "polygon": [[20, 30], [30, 30], [30, 35], [20, 35]]},
    {"label": "truck", "polygon": [[45, 40], [50, 40], [50, 44], [45, 44]]},
    {"label": "vegetation", "polygon": [[44, 38], [52, 38], [52, 46], [44, 46]]},
]


def write_cityscapes(root: Path, objects: Any = OBJECTS) -> Path:
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        images, polygons = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        images.mkdir(parents=True)
        polygons.mkdir(parents=True)
        for frame in range(2):
            stem = f"{city}_00000{frame}_000019"
            cv2.imwrite(str(images / f"{stem}_leftImg8bit.png"), np.full((H, W, 3), 90 + frame, np.uint8))
            content = {"imgHeight": H, "imgWidth": W, "objects": objects if frame == 0 else []}
            (polygons / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
    lines = ["format: cityscapes"]
    lines += [f"{s}: {{images: leftImg8bit/{s}, annotations: gtFine/{s}}}" for s in ("train", "val")]
    (root / "cityscapes.yaml").write_text("\n".join(lines) + "\n")
    return root / "cityscapes.yaml"


def test_what_shows_of_each_thing(tmp_path: Path) -> None:
    spec = find_data(write_cityscapes(tmp_path))
    assert spec.names == list(CLASSES)
    data = load_split(spec, "train", masks=True)
    assert [Path(path).name for path in data.paths] == [f"aachen_00000{i}_000019_leftImg8bit.png" for i in range(2)]
    assert [data.names[label] for label in data.labels] == ["car", "car", "person"]
    assert data.boxes.tolist() == [[10, 10, 40, 40], [61, 10, 100, 30], [12, 12, 20, 20]]
    assert data.crowd.tolist() == [False, True, False]
    assert data.areas.tolist() == [30 * 30 - 64, 39 * 20, 64]
    assert data.masks is not None
    car = decode_rle(data.masks.counts(0), H, W)
    assert car.sum() == 30 * 30 - 64
    assert car[30, 25]
    assert not car[15, 15]
    assert data.offsets.tolist() == [0, 3, 3]
    assert data.faults.counts == {
        "polygons of fewer than three points, left out": 1,
        "objects that are wholly hidden, left out": 1,
    }
    assert load_split(spec, "val").masks is None


def test_it_is_converted_with_its_masks(tmp_path: Path) -> None:
    spec = find_data(write_cityscapes(tmp_path / "in"))
    made = find_data(convert_data(spec, "coco", tmp_path / "out").yaml)
    before, after = load_split(spec, "train", masks=True), load_split(made, "train", masks=True)
    assert after.boxes.tolist() == before.boxes.tolist()
    assert after.crowd.tolist() == before.crowd.tolist()
    assert before.masks is not None
    assert after.masks is not None
    assert [after.masks.counts(i) for i in range(3)] == [before.masks.counts(i) for i in range(3)]
    with pytest.raises(UserError, match="cityscapes is read and not written; choose one of coco"):
        convert_data(spec, "cityscapes", tmp_path / "back")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.write_text("{"), "not valid JSON"),
        (lambda file: file.write_text('{"objects": []}'), "lacks 'imgHeight'"),
        (
            lambda file: file.write_text('{"imgHeight": 64, "imgWidth": 128, "objects": [{}]}'),
            r"objects\[0\] .*no 'label'",
        ),
        (lambda file: file.write_text('{"imgHeight": 60, "imgWidth": 128, "objects": []}'), "128x64"),
        (lambda file: file.unlink(), "has no file"),
    ],
)
def test_files_that_are_not_as_described(tmp_path: Path, spoil: Any, said: str) -> None:
    yaml = write_cityscapes(tmp_path)
    for file in (tmp_path / "gtFine" / "train").rglob("*.json"):
        spoil(file)
    with pytest.raises(UserError, match=said):
        load_split(find_data(yaml), "train")
