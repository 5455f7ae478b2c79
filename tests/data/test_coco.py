"""The COCO reader: what it keeps, what it counts and drops, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import NAMES, MakeSet
from yoloxkd.data import FORMATS
from yoloxkd.data.convert import describe_loss
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.errors import UserError


def read(make_set: MakeSet, content: dict[str, Any], names: list[str] = NAMES) -> DetectionData:
    return read_coco(*make_set(content), names, "train")


def test_categories_are_matched_by_name_and_boxes_go_to_their_image(make_set: MakeSet, content: dict[str, Any]) -> None:
    data = read(make_set, content)
    assert data.image_ids.tolist() == [30, 10, 20]
    assert data.sizes.tolist() == [[48, 64], [40, 40], [64, 32]]
    assert data.offsets.tolist() == [0, 1, 1, 3]
    assert data.labels.tolist() == [1, 0, 1]
    assert data.crowd.tolist() == [False, False, True]
    assert data.annotation_ids.tolist() == [5, 7, 9]
    assert data.areas.tolist() == [320, 150.5, 900]
    np.testing.assert_allclose(data.boxes, [[10.5, 8, 30.5, 24], [2, 4, 12, 24], [0, 0, 32, 64]])
    assert data.boxes.dtype == np.float64
    assert len(data.faults) == 0
    boxes, labels, crowd = data.annotations(2)
    assert (boxes.shape, labels.tolist(), crowd.tolist()) == ((2, 4), [0, 1], [False, True])
    assert data.annotations(1)[0].shape == (0, 4)
    assert data.read(1).shape == (40, 40, 3)


def test_the_order_of_names_is_the_order_of_labels(make_set: MakeSet, content: dict[str, Any]) -> None:
    assert read(make_set, content, ["dog", "bird", "cat"]).labels.tolist() == [0, 2, 0]


def test_a_missing_area_is_that_of_the_box(make_set: MakeSet, content: dict[str, Any]) -> None:
    del content["annotations"][1]["area"]
    assert read(make_set, content).areas[0] == 20 * 16


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"bbox": [4, 4, 0, 10]}, "dropped, of zero or negative size"),
        ({"bbox": [4, 4, 10, -3]}, "dropped, of zero or negative size"),
        ({"bbox": [100, 4, 10, 10]}, "dropped, outside the image"),
        ({"bbox": [-20, 4, 15, 10]}, "dropped, outside the image"),
        ({"bbox": [float("nan"), 4, 10, 10]}, "dropped, whose box is not four finite numbers"),
        ({"bbox": [1, 4, float("inf"), 10]}, "dropped, whose box is not four finite numbers"),
        ({"bbox": [1, 4, 10]}, "dropped, whose box is not four finite numbers"),
        ({"bbox": None}, "dropped, whose box is not four finite numbers"),
        ({"bbox": ["1", "x", 3, 4]}, "dropped, whose box is not four finite numbers"),
        ({"category_id": 4}, "dropped, of an unknown category"),
        ({"category_id": None}, "dropped, of an unknown category"),
        ({"image_id": 11}, "dropped, of an unknown image"),
    ],
)
def test_annotations_that_cannot_be_used_are_counted_and_dropped(
    make_set: MakeSet, content: dict[str, Any], change: dict[str, Any], kind: str
) -> None:
    content["annotations"][1].update(change)
    data = read(make_set, content)
    assert data.faults.counts == {kind: 1}
    assert data.annotation_ids.tolist() == [7, 9]
    assert data.offsets.tolist() == [0, 0, 0, 2]
    said = f"annotations: 1 {kind} (e.g. {make_set(content)[1]}:1, annotation 5)"
    assert data.faults.describe() == said
    assert data.faults.describe() in data.summary()


def test_a_box_that_sticks_out_is_clipped_and_counted(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["annotations"][1]["bbox"] = [54, -6, 20, 16]
    data = read(make_set, content)
    assert data.boxes[0].tolist() == [54, 0, 64, 10]
    assert data.faults.counts == {"clipped to the image": 1}


def test_rounding_is_no_fault(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["annotations"][1]["bbox"] = [54, 4, 10.01, 16]
    data = read(make_set, content)
    assert data.boxes[0, 2] == 64
    assert len(data.faults) == 0


def test_a_category_that_is_not_wanted_is_counted(make_set: MakeSet, content: dict[str, Any]) -> None:
    data = read(make_set, content, ["cat"])
    assert data.faults.counts == {"dropped, of a category that is not in names": 2}
    assert data.annotation_ids.tolist() == [7]


def test_ids_are_kept_where_they_tell_annotations_apart(make_set: MakeSet, content: dict[str, Any]) -> None:
    for own in (0, -4):
        content["annotations"][0]["id"] = own
        data = read(make_set, content)
        assert sorted(data.annotation_ids) == [own, 5, 9]
        assert not data.renumbered
        assert not any("numbers" in sentence for sentence in describe_loss(data, FORMATS["coco"]))
    for own in (5, "x", None):
        content["annotations"][0]["id"] = own
        data = read(make_set, content)
        assert sorted(data.annotation_ids) == [1, 2, 3]
        assert data.renumbered
        assert any("numbered anew" in sentence for sentence in describe_loss(data, FORMATS["coco"]))


def test_no_common_name_shows_both_lists(make_set: MakeSet, content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"none of the names .*\(Cat, bird\).*\(dog, cat\)"):
        read(make_set, content, ["Cat", "bird"])


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_file_that_lacks_a_list_is_refused(make_set: MakeSet, content: dict[str, Any], key: str) -> None:
    del content[key]
    with pytest.raises(UserError, match=rf"instances\.json is not in COCO format: it lacks a list '{key}'"):
        read(make_set, content)


@pytest.mark.parametrize("text", ["{", "", "\x00", "[1, 2"])
def test_what_is_not_json_is_refused(make_set: MakeSet, text: str) -> None:
    images, file = make_set()
    file.write_text(text)
    with pytest.raises(UserError, match=r"instances\.json is not valid JSON"):
        read_coco(images, file, NAMES, "train")


def test_a_json_file_of_another_kind_is_refused(make_set: MakeSet) -> None:
    images, file = make_set()
    file.write_text("[]")
    with pytest.raises(UserError, match="not in COCO format"):
        read_coco(images, file, NAMES, "train")


def test_a_missing_annotation_file_is_named(make_set: MakeSet) -> None:
    images, file = make_set()
    with pytest.raises(UserError, match=r"cannot read the annotation file .*other\.json"):
        read_coco(images, file.with_name("other.json"), NAMES, "train")


def test_two_images_of_one_id_are_refused(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["images"][1]["id"] = 30
    with pytest.raises(UserError, match="image id 30 to 2 images"):
        read(make_set, content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": None}, "not a positive whole number"),
        ({"height": 0}, "not a positive whole number"),
        ({"width": "64.5"}, r"images\[1\] \(b.png\) .* width .64.5., .* not a positive whole number"),
        ({"id": None}, "not a whole number or a text"),
        ({"id": True}, "not a whole number or a text"),
    ],
)
def test_images_without_usable_size_or_id_are_refused(
    make_set: MakeSet, content: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    content["images"][1].update(change)
    with pytest.raises(UserError, match=said):
        read(make_set, content)


def test_an_image_without_a_file_name_is_refused(make_set: MakeSet, content: dict[str, Any]) -> None:
    del content["images"][1]["file_name"]
    with pytest.raises(UserError, match="without a usable 'file_name'"):
        read(make_set, content)


def test_missing_image_files_are_counted_at_load(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["images"][1]["file_name"] = "gone.jpg"
    content["images"][2]["file_name"] = "gone-too.jpg"
    with pytest.raises(UserError, match=r"gone\.jpg.*is missing \(the first of 2 such files out of 3\)"):
        read(make_set, content)


def test_no_annotation_at_all_is_a_data_set_without_boxes(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["annotations"] = []
    data = read(make_set, content)
    assert (len(data), data.boxes.shape, data.offsets.tolist()) == (3, (0, 4), [0, 0, 0, 0])
    assert data.ground_truth()["annotations"] == []


def test_bccd_has_the_boxes_its_description_counts(bccd: Path) -> None:
    expected = {
        "train": (205, {"RBC": 2381, "WBC": 214, "Platelets": 209}),
        "val": (87, {"RBC": 967, "WBC": 87, "Platelets": 83}),
        "test": (72, {"RBC": 805, "WBC": 71, "Platelets": 69}),
    }
    names = ["Platelets", "RBC", "WBC"]
    for split, (images, boxes) in expected.items():
        data = read_coco(bccd / "images" / split, bccd / "annotations" / f"{split}.json", names, split)
        assert len(data) == images
        assert len(data.faults) == 0
        assert dict(zip(names, np.bincount(data.labels).tolist(), strict=True)) == boxes
        assert (data.sizes == (480, 640)).all()
        assert not data.crowd.any()


def test_coco_sample_with_sparse_ids_and_crowds(coco_mini: Path) -> None:
    import json

    file = coco_mini / "annotations" / "val.json"
    raw = json.loads(file.read_text())
    names = [c["name"] for c in raw["categories"]]
    data = read_coco(coco_mini / "images" / "val", file, names, "val")
    assert (len(data), len(data.boxes), int(data.crowd.sum())) == (50, 382, 5)
    assert len(data.faults) == 0
    assert (np.diff(data.offsets) == 0).sum() == 2
    name_of_id = {c["id"]: c["name"] for c in raw["categories"]}
    said = {a["id"]: (a["image_id"], name_of_id[a["category_id"]], a["area"]) for a in raw["annotations"]}
    image_of_box = np.repeat(data.image_ids, np.diff(data.offsets)).tolist()
    rows = zip(data.annotation_ids.tolist(), image_of_box, data.labels.tolist(), data.areas.tolist(), strict=True)
    assert {i: (image, names[label], area) for i, image, label, area in rows} == said
