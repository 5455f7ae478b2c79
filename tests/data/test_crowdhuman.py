"""The CrowdHuman reader: full bodies, ignore regions, visible and head boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.crowdhuman import read_crowdhuman
from yoloxkd.errors import UserError


def box(fbox: list[float], tag: str = "person", **extra: Any) -> dict[str, Any]:
    return {"tag": tag, "fbox": fbox, "vbox": fbox, "hbox": [fbox[0], fbox[1], 4, 4], "extra": extra}


ROWS: list[dict[str, Any]] = [
    {"ID": "1,a", "gtboxes": [box([-5, 4, 20, 30]), box([8, 8, 10, 10], ignore=1), box([0, 0, 80, 20], "mask")]},
    {"ID": "2,b", "gtboxes": []},
    {"ID": "3,c", "gtboxes": [box([90, 0, 9, 9]), {"tag": "person", "fbox": [2, 2, 6, 6]}]},
]


def make(folder: Path, rows: list[Any]) -> tuple[Path, Path]:
    (folder / "Images").mkdir(exist_ok=True)
    for name in ("1,a", "2,b", "3,c"):
        assert cv2.imwrite(str(folder / "Images" / f"{name}.jpg"), np.zeros((40, 80, 3), np.uint8))
    file = folder / "annotation_train.odgt"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return folder / "Images", file


def read(folder: Path, rows: list[Any]) -> DetectionData:
    return read_crowdhuman(*make(folder, rows), ["person"], "train")


def test_full_bodies_are_trained_and_the_rest_is_kept(tmp_path: Path) -> None:
    data = read(tmp_path, ROWS)
    assert data.boxes.tolist() == [[0, 4, 15, 34], [8, 8, 18, 18], [0, 0, 80, 20], [2, 2, 8, 8]]
    assert data.crowd.tolist() == [False, True, True, False]
    assert data.unclipped is not None
    assert data.unclipped[0].tolist() == [-5, 4, 15, 34]
    assert data.difficult is not None
    assert data.difficult.tolist() == [False, True, False, False]
    assert data.visible is not None
    assert data.visible[1].tolist() == [8, 8, 18, 18]
    assert np.isnan(data.visible[3]).all()
    assert data.head_boxes is not None
    assert data.head_boxes[0].tolist() == [-5, 4, -1, 8]
    assert data.unseen is not None
    assert data.unseen.tolist() == [[2, 90, 0, 99, 9]]
    assert data.faults.counts == {"dropped, outside the image": 1, "clipped to the image": 1}
    assert data.faults.examples["dropped, outside the image"][0].line == 3
    assert (data.format, data.offsets.tolist()) == ("crowdhuman", [0, 3, 3, 4])
    head = data.head(1)
    assert head.visible is not None
    assert (len(head.visible), head.unseen is not None and head.unseen.tolist()) == (3, [])


def test_a_tag_counts_in_any_case_and_an_unknown_one_is_said(tmp_path: Path) -> None:
    row = {
        "ID": "1,a",
        "gtboxes": [box([0, 0, 9, 9], "Person "), box([9, 9, 9, 9], "mask"), box([20, 0, 9, 9], "rider")],
    }
    data = read(tmp_path, [row])
    assert data.crowd.tolist() == [False, True, True]
    assert data.faults.counts == {"whose tag is neither person nor mask, taken as regions to ignore": 1}


def test_names_may_be_left_out_and_are_one(tmp_path: Path) -> None:
    make(tmp_path, ROWS)
    (tmp_path / "set.yaml").write_text("train: {images: Images, annotations: annotation_train.odgt}\n")
    spec = find_data(tmp_path / "set.yaml")
    assert (spec.format, spec.names) == ("crowdhuman", ["person"])
    assert len(load_split(spec, "train")) == 3
    with pytest.raises(UserError, match="one class, and the data YAML names 2"):
        read_crowdhuman(*make(tmp_path, ROWS), ["person", "head"], "train")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "is not JSON"),
        ({"gtboxes": []}, "no usable 'ID'"),
        ({"ID": "../x", "gtboxes": []}, "no usable 'ID'"),
        ({"ID": "x"}, "no list 'gtboxes'"),
        (ROWS[0], "has the ID of line 1"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"line 2 of .*annotation_train\.odgt .*{said}"):
        read(tmp_path, [ROWS[0], row])


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"9,z\.jpg, listed in .*odgt, is missing"):
        read(tmp_path, [{"ID": "9,z", "gtboxes": []}])
