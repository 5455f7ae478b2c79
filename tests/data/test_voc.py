"""The VOC reader: corners from 1, lists and folders, difficult objects, and faults by file and line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.formats.voc import parse_voc, read_voc
from yoloxkd.data.problems import Place
from yoloxkd.errors import UserError

NAMES = ["cat", "dog"]
OBJECT = "<object>\n<name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def make(folder: Path, files: dict[str, list[tuple[object, ...]] | None], size: str = "") -> Path:
    """ImageColumns of 80x40 px and their files in VOC's layout; a file None is not written."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, objects in files.items():
        assert cv2.imwrite(str(folder / "JPEGImages" / f"{stem}.jpg"), np.zeros((40, 80, 3), np.uint8))
        if objects is not None:
            rows = "\n".join(OBJECT.format(*row) for row in objects)
            (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>\n{size}\n{rows}\n</annotation>\n")
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{stem}\n" for stem in files))
    return folder / "ImageSets" / "Main" / "train.txt"


def test_corners_count_from_one_and_difficult_is_ignored(tmp_path: Path) -> None:
    files = {"a": [("dog", 0, 1, 1, 80, 40), ("cat", 1, 11, 6, 20, 10)], "b": []}
    data = read_voc([], [], [make(tmp_path, files)], NAMES, "train")
    assert data.boxes.tolist() == [[0, 0, 80, 40], [10, 5, 20, 10]]
    assert (data.labels.tolist(), data.crowd.tolist()) == ([1, 0], [False, True])
    assert data.difficult is not None
    assert data.difficult.tolist() == [False, True]
    assert (data.offsets.tolist(), data.sizes.tolist(), data.format) == ([0, 2, 2], [[40, 80]] * 2, "voc")


def test_whole_folders_and_a_yaml(tmp_path: Path) -> None:
    make(tmp_path, {"a": [("dog", 0, 1, 1, 80, 40)], "b": None})
    spec = "names: [cat, dog]\ntrain: {images: JPEGImages, annotations: Annotations}\nval: {list: ImageSets/Main/train.txt}"
    (tmp_path / "set.yaml").write_text(spec)
    for split in ("train", "val"):
        data = load_split(find_data(tmp_path / "set.yaml"), split)
        assert (len(data), len(data.boxes)) == (2, 1)
        assert data.faults.counts == {"images without an annotation file, taken as without objects": 1}
    with pytest.raises(UserError, match="'list'"):
        read_voc([tmp_path / "JPEGImages"], [], [], NAMES, "train")


def test_faults_are_named_by_file_and_line(tmp_path: Path) -> None:
    rows = [("dog", 0, 1, 1, 80, 40), ("bird", 0, 1, 1, 9, 9), ("cat", 0, 9, 9, 8, 20), ("cat", 0, "x", 9, 8, 20)]
    data = read_voc([], [], [make(tmp_path, {"a": rows})], NAMES, "train")
    file = str(tmp_path / "Annotations" / "a.xml")
    assert data.faults.examples == {
        "dropped, of a category that is not in names": [Place(file, 5)],
        "dropped, of zero or negative size": [Place(file, 7)],
        "dropped, whose box is not four finite numbers": [Place(file, 9)],
    }


def test_the_size_in_the_file_is_held_against_the_image(tmp_path: Path) -> None:
    size = "<size><width>80</width><height>50</height><depth>3</depth></size>"
    with pytest.raises(UserError, match=r"a\.jpg.*80x40 px but its annotation file says 80x50; correct one of them"):
        read_voc([], [], [make(tmp_path, {"a": [("dog", 0, 1, 1, 8, 4)]}, size)], NAMES, "train")


def test_parts_of_objects_are_not_objects() -> None:
    part = "<part><name>head</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></part>"
    text = f"<annotation><object>{part}<name>dog</name><bndbox><xmin>1.5</xmin></bndbox></object></annotation>"
    (one,) = parse_voc(text.encode()).objects
    assert one.elements == {"name": "dog", "xmin": "1.5"}


def test_what_is_no_xml_and_places_that_are_not_there(tmp_path: Path) -> None:
    listed = make(tmp_path, {"a": []})
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation>\n<object>\n</annotation>")
    with pytest.raises(UserError, match=r"a\.xml is not valid XML: mismatched tag, line 3"):
        read_voc([], [], [listed], NAMES, "train")
    (tmp_path / "Annotations" / "a.xml").unlink()
    with pytest.raises(UserError, match=r"none of the 1 images of 'train' has an annotation file"):
        read_voc([], [], [listed], NAMES, "train")
    with pytest.raises(UserError, match=r"cannot read .*none\.txt"):
        read_voc([], [], [tmp_path / "none.txt"], NAMES, "train")
