"""The YOLO reader: where labels are looked for, what a line may hold, and faults by file and line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.yolo import read_yolo
from yoloxkd.data.problems import UNREADABLE, Faults, Place
from yoloxkd.errors import UserError

NAMES = ["cat", "dog"]


def make(folder: Path, labels: dict[str, str | None]) -> Path:
    """Images of 80x40 px under images/train with label files under labels/train (None: no file)."""
    for name, text in labels.items():
        image = folder / "images" / "train" / f"{name}.png"
        label = folder / "labels" / "train" / f"{name}.txt"
        image.parent.mkdir(parents=True, exist_ok=True)
        label.parent.mkdir(parents=True, exist_ok=True)
        (image.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (label.parent / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(image), np.zeros((40, 80, 3), np.uint8))
        if text is not None:
            label.write_text(text)
    return folder / "images" / "train"


def read(folder: Path, labels: dict[str, str | None], **options: object) -> DetectionData:
    return read_yolo([make(folder, labels)], None, NAMES, "train", folder, **options)  # type: ignore[arg-type]


def test_boxes_come_in_pixels_and_images_without_a_file_are_empty(tmp_path: Path) -> None:
    data = read(tmp_path, {"a": "1 0.5 0.5 0.25 0.5\n0 0.25 0.25 0.1 0.2\n", "b": None, "c": ""})
    assert (len(data), data.offsets.tolist(), data.labels.tolist()) == (3, [0, 2, 2, 2], [1, 0])
    np.testing.assert_allclose(data.boxes, [[30, 10, 50, 30], [16, 6, 24, 14]], atol=1e-12)
    assert data.sizes.tolist() == [[40, 80]] * 3
    assert (len(data.faults), data.format, data.read(0).shape) == (0, "yolo", (40, 80, 3))


def test_a_polygon_is_the_box_around_it(tmp_path: Path) -> None:
    data = read(tmp_path, {"a": "0 0.1 0.2 0.5 0.1 0.3 0.6\n1 0.5 0.5 0.25 0.5\n\n"})
    np.testing.assert_allclose(data.boxes[0], [8, 4, 40, 24], atol=1e-12)
    assert data.labels.tolist() == [0, 1]


def test_corners_in_place_of_center_and_size_are_refused(tmp_path: Path) -> None:
    text = "0 0.6 0.6 0.9 0.95\n0 0.1 0.1 0.3 0.4\n1 0.5 0.7 0.8 1\n"
    with pytest.raises(UserError, match=r"a\.txt:1 stick out .* and none as \[x1, y1, x2, y2\]"):
        read(tmp_path, {"a": text})
    assert len(read(tmp_path, {"a": text + "0 0.5 0.5 0.1 0.1\n"}).boxes) == 4


def test_polygons_and_oriented_boxes_with_a_score_are_read_without_it(tmp_path: Path) -> None:
    oriented = "0 0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75"
    data = read(tmp_path, {"a": f"{oriented} 0.9\n", "b": f"{oriented}\n", "c": f"{oriented} 7\n"})
    np.testing.assert_array_equal(data.boxes[0], data.boxes[1])
    assert len(data.boxes) == 2
    assert data.faults.counts == {
        "polygons with a last column of their own, taken for a score and left out": 1,
        "dropped, lines that are not 'class x y w h' or a polygon": 1,
    }


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.2", "dropped, lines that are not 'class x y w h' or a polygon"),
        ("0 0.5 0.5 0.2 0.2 45", "dropped, lines with a sixth column that is no score (0 to 1)"),
        ("0 0,5 0,5 0,2 0,2", "dropped, lines that are not 'class x y w h' or a polygon"),
        ("cat 0.5 0.5 0.2 0.2", "dropped, lines that are not 'class x y w h' or a polygon"),
        ("2 0.5 0.5 0.2 0.2", "dropped, of an unknown category"),
        ("0.5 0.5 0.5 0.2 0.2", "dropped, of an unknown category"),
        ("-1 0.5 0.5 0.2 0.2", "dropped, of an unknown category"),
        ("0 0.5 0.5 0 0.2", "dropped, of zero or negative size"),
        ("0 0.5 0.5 nan 0.2", "dropped, whose box is not four finite numbers"),
        ("0 1.5 0.5 0.2 0.2", "dropped, outside the image"),
        ("0 40 20 20 10", "dropped, whose values are not fractions of the image (0 to 1)"),
        ("0 0.95 0.5 0.2 0.2", "clipped to the image"),
    ],
)
def test_faults_are_named_by_file_and_line(tmp_path: Path, line: str, kind: str) -> None:
    data = read(tmp_path, {"a": f"1 0.5 0.5 0.2 0.2\n{line}\n", "b": "1 0.5 0.5 0.2 0.2\n"})
    assert data.faults.counts == {kind: 1}
    assert data.faults.examples[kind] == [Place(str(tmp_path / "labels" / "train" / "a.txt"), 2)]
    assert len(data.boxes) == (3 if kind.startswith("clipped") else 2)


def test_list_files_labels_elsewhere_and_subfolders(tmp_path: Path) -> None:
    make(tmp_path, {"deep/a": "0 0.5 0.5 0.5 0.5", "b": "1 0.5 0.5 0.5 0.5"})
    (tmp_path / "list.txt").write_text("./images/train/b.png\nimages/train/deep/a.png\n\n")
    data = read_yolo([tmp_path / "list.txt"], None, NAMES, "train", tmp_path)
    assert [Path(p).name for p in data.paths] == ["b.png", "a.png"]
    assert data.labels.tolist() == [1, 0]
    (tmp_path / "labels").rename(tmp_path / "texts")
    data = read_yolo([tmp_path / "images" / "train"], tmp_path / "texts" / "train", NAMES, "train", tmp_path)
    assert data.labels.tolist() == [1, 0]
    (tmp_path / "set.yaml").write_text("names: [cat, dog]\ntrain: {images: images/train, labels: texts/train}")
    assert load_split(find_data(tmp_path / "set.yaml"), "train").labels.tolist() == [1, 0]


def test_no_label_file_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"none of the 2 images of 'train' has a label file; looked for .*labels.*a\.txt"
    ):
        read(tmp_path, {"a": None, "b": None})


def test_missing_places_and_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image folder or list file"):
        read_yolo([tmp_path / "none"], None, NAMES, "train", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image in .*empty"):
        read_yolo([tmp_path / "empty"], None, NAMES, "train", tmp_path)
    (tmp_path / "list.txt").write_text("gone.png\n")
    with pytest.raises(UserError, match=r"gone\.png, listed in .*list\.txt, is missing"):
        read_yolo([tmp_path / "list.txt"], None, NAMES, "train", tmp_path)


def test_gathering_goes_on_past_broken_images_and_sees_unused_labels(tmp_path: Path) -> None:
    images = make(tmp_path, {"a": "0 0.5 0.5 0.5 0.5", "b": "1 0.5 0.5 0.5 0.5\n1 0.5 0.5 0.5 0.5\n"})
    (images / "a.png").write_bytes(b"")
    (tmp_path / "labels" / "train" / "lost.txt").write_text("")
    faults = Faults(gather=True, max_places=None)
    data = read_yolo([images], None, NAMES, "train", tmp_path, faults)
    assert (len(data), data.labels.tolist()) == (1, [1, 1])
    assert faults.counts == {
        UNREADABLE: 1,
        "label files without an image": 1,
        "repeated: the same box of the same class again (kept)": 1,
    }
    assert faults.breaking == {UNREADABLE}
