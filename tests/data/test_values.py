"""Values of another type than the format's: understood as what they plainly say, or told by file and row."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import NAMES, MakeSet
from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import DataSpec, find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.formats.coco import read_coco
from yoloxkd.data.formats.values import flag, id_key, number, size_px
from yoloxkd.data.problems import Faults
from yoloxkd.errors import UserError

UNCLEAR = "whose iscrowd or ignore is neither 0 nor 1, taken as 0"
AREAS = "areas that the box cannot have, replaced by the box's"


def read(make_set: MakeSet, content: dict[str, Any], **options: Any) -> DetectionData:
    return read_coco(*make_set(content), NAMES, "train", **options)


def with_ids(content: dict[str, Any], ids: list[Any], said: list[Any] | None = None) -> dict[str, Any]:
    """The small set with other image ids; `said`: how the annotations write them."""
    at = {30: 0, 10: 1, 20: 2}
    for row in content["annotations"]:
        row["image_id"] = (said or ids)[at[row["image_id"]]]
    for image in content["images"]:
        image["id"] = ids[at[image["id"]]]
    return content


def test_single_values() -> None:
    assert [flag(v) for v in (None, 0, False, "0", "", " no ", 0.0, "False")] == [False] * 8
    assert [flag(v) for v in (1, True, "1", " 1 ", "yes", 1.0, "TRUE")] == [True] * 7
    assert [flag(v) for v in (2, -1, "2", "Unspecified", [], {}, math.nan)] == [None] * 7
    assert [number(v) for v in ("1", " 1.5 ", "-2e3", 7, 0.5, ".5")] == [1, 1.5, -2000, 7, 0.5, 0.5]
    assert all(math.isnan(number(v)) for v in (None, True, "1,5", "x", "", "nan", "1_0", [1], "0x10"))
    assert number(10**400) == math.inf
    assert [size_px(v) for v in (64, 64.0, "64", "64.0", " 64 ")] == [64] * 5
    assert [size_px(v) for v in (0, -1, 64.5, "64px", None, True, math.nan, 10**25, [64], "²")] == [None] * 10
    assert [id_key(v) for v in (7, "7", 7.0, " 7 ", "-7", "007", "a b", 10**30)] == [
        7,
        7,
        7,
        7,
        -7,
        "007",
        "a b",
        10**30,
    ]
    assert [id_key(v) for v in (None, True, math.nan, 1.5, "", [], {})] == [None] * 7


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([-1, 0, 5], None),
        ([2**53 + 1, 2**53, 2**53 + 2], None),
        ([2**63, 2**63 + 1, -(2**70)], None),
        ([2**62, -(2**62), -(2**63)], None),
        (["1", "2", "3"], [1, 2, 3]),
        ([1, 2, 3], ["1", "2", "3"]),
        ([1.0, 2.0, 3.0], [1, "2", 3.0]),
        (["img_1", "b7f6-9e", "01"], None),
        (["a", 2, "3"], ["a", "2", 3]),
    ],
)
def test_image_ids_of_any_kind_find_their_boxes_and_come_back(
    make_set: MakeSet, content: dict[str, Any], ids: list[Any], said: list[Any] | None
) -> None:
    plain = read(make_set, content)
    data = read(make_set, with_ids(content, ids, said))
    assert len(data.faults) == 0
    assert data.offsets.tolist() == plain.offsets.tolist() == [0, 1, 1, 3]
    np.testing.assert_array_equal(data.boxes, plain.boxes)
    assert [(type(i), i) for i in data.own_image_ids()] == [(int if type(i) is float else type(i), i) for i in ids]
    assert data.image_ids.dtype == np.int64
    assert len(set(data.image_ids.tolist())) == 3
    assert data.head(2).own_image_ids() == ids[:2]


@pytest.mark.parametrize("ids", [[-3, 0], ["3", "90"], ["c/at", "D"], [2**65, -(2**65)], [3.0, 90.0]])
def test_category_ids_of_any_kind(make_set: MakeSet, content: dict[str, Any], ids: list[Any]) -> None:
    other = {3: ids[0], 90: ids[1]}
    for row in content["annotations"]:
        row["category_id"] = other[row["category_id"]]
    for row in content["categories"]:
        row["id"] = other[row["id"]]
    data = read(make_set, content)
    assert data.labels.tolist() == [1, 0, 1]
    assert data.categories() == ids
    assert [row["category_id"] for row in data.ground_truth()["annotations"]] == [
        data.ground_truth()["categories"][label]["id"] for label in data.labels
    ]


def test_results_have_the_ids_of_the_file(make_set: MakeSet, content: dict[str, Any]) -> None:
    from tests.engine.test_evaluate import Oracle
    from yoloxkd.data.loader import eval_loader
    from yoloxkd.engine.evaluate import evaluate

    content["categories"] = [{"id": "D", "name": "dog"}, {"id": 2**65, "name": "cat"}]
    for row in content["annotations"]:
        row["category_id"] = {90: "D", 3: 2**65}[row["category_id"]]
    data = read(make_set, with_ids(content, ["a.jpg", 2**70, -4]))
    result = evaluate(Oracle(data, 64, NAMES), eval_loader(data, imgsz=64, batch=2), data)
    assert result.metrics["AP"] == pytest.approx(1.0)
    found = [(row["image_id"], row["category_id"]) for row in result.coco_results()]
    assert found == [("a.jpg", "D"), (-4, 2**65), (-4, "D")]


def test_converted_to_coco_the_ids_stay(make_set: MakeSet, content: dict[str, Any], tmp_path: Path) -> None:
    make_set(with_ids(content, ["a.jpg", 2**70, -4]))
    (tmp_path / "set.yaml").write_text("names: [cat, dog]\ntrain: {images: images, annotations: instances.json}")
    convert_data(find_data(tmp_path / "set.yaml"), "coco", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "annotations" / "train.json").read_text())
    assert [image["id"] for image in written["images"]] == ["a.jpg", 2**70, -4]
    assert [row["image_id"] for row in written["annotations"]] == ["a.jpg", -4, -4]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": None}, r"images\[1\] \(b.png\) .* has the id nothing, which is not a whole number or a text"),
        ({"id": True}, r"images\[1\] .* id True"),
        ({"id": 1.5}, r"images\[1\] .* id 1.5"),
        ({"id": 30.0}, r"image id 30 to 2 images, of which images\[0\] and images\[1\]"),
        ({"id": "30"}, r"image id 30 to 2 images"),
        ({"width": "x"}, r"images\[1\] \(b.png\) .* has the width 'x', which is not a positive whole number"),
        ({"height": 1e300}, r"images\[1\] .* the height 1e\+300"),
        ({"file_name": 7}, r"images\[1\] .* the file_name 7, which is not a text"),
        ({"file_name": " "}, r"images\[1\] .* file_name"),
    ],
)
def test_images_are_refused_by_row(
    make_set: MakeSet, content: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    content["images"][1] |= change
    with pytest.raises(UserError, match=said):
        read(make_set, content)


def test_sizes_as_text_are_sizes(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["images"][1] |= {"width": "40", "height": "40.0"}
    assert read(make_set, content).sizes[1].tolist() == [40, 40]


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_row_that_is_no_object_is_named(make_set: MakeSet, content: dict[str, Any], key: str) -> None:
    content[key].insert(1, "x")
    with pytest.raises(UserError, match=rf"{key}\[1\] of .* is no object with keys, but 'x'"):
        read(make_set, content)


def test_lists_nested_without_end_are_refused(make_set: MakeSet, content: dict[str, Any]) -> None:
    images, file = make_set(content)
    file.write_text(file.read_text().replace('"iscrowd": 1', '"segmentation": ' + "[" * 100_000 + "]" * 100_000))
    with pytest.raises(UserError, match="nested too deeply"):
        read_coco(images, file, NAMES, "train")


@pytest.mark.parametrize(
    ("changes", "crowd", "faults"),
    [
        ({"iscrowd": "0"}, False, {}),
        ({"iscrowd": "1"}, True, {}),
        ({"iscrowd": None}, False, {}),
        ({"iscrowd": True}, True, {}),
        ({"iscrowd": 2}, False, {UNCLEAR: 1}),
        ({"iscrowd": "maybe"}, False, {UNCLEAR: 1}),
        ({"iscrowd": [1]}, False, {UNCLEAR: 1}),
        ({"ignore": "false"}, False, {}),
        ({"ignore": "yes"}, True, {}),
        ({"ignore": {}}, False, {UNCLEAR: 1}),
        ({"bbox": ["10.5", "8", "20", " 16 "]}, False, {}),
    ],
)
def test_flags_and_boxes_as_text(
    make_set: MakeSet, content: dict[str, Any], changes: dict[str, Any], crowd: bool, faults: dict[str, int]
) -> None:
    content["annotations"][1] |= changes
    data = read(make_set, content)
    assert data.crowd.tolist() == [crowd, False, True]
    assert {kind: n for kind, n in data.faults.counts.items() if "ignored for iscrowd" not in kind} == faults
    np.testing.assert_allclose(data.boxes[0], [10.5, 8, 30.5, 24])


@pytest.mark.parametrize("box", [[True, False, 20, 16], ["10,5", 8, 20, 16], [10.5, 8, 20, 16, 1], {"x": 1}, "1 2 3 4"])
def test_what_is_no_box_is_told_by_row(make_set: MakeSet, content: dict[str, Any], box: Any) -> None:
    content["annotations"][1]["bbox"] = box
    data = read(make_set, content)
    assert data.faults.counts == {"dropped, whose box is not four finite numbers": 1}
    assert data.annotation_ids.tolist() == [7, 9]


def test_an_annotation_without_an_id_is_named_by_its_place(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["annotations"][1] |= {"id": "x", "bbox": None}
    data = read(make_set, content)
    (place,) = data.faults.examples["dropped, whose box is not four finite numbers"]
    assert place.note == "annotations[1]"


@pytest.mark.parametrize("area", [0, -5, 0.001, 5000, math.nan, math.inf, True, "x", [320], 10**25])
def test_an_area_that_no_box_can_have_is_the_boxs(make_set: MakeSet, content: dict[str, Any], area: Any) -> None:
    content["annotations"][1] |= {"area": area}
    data = read(make_set, content)
    assert data.areas.tolist() == [320, 150.5, 900]
    assert data.faults.counts == {AREAS: 1}


def test_a_text_or_no_area_is_no_fault(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["annotations"][1] |= {"area": "300"}
    content["annotations"][0] |= {"area": None}
    data = read(make_set, content)
    assert data.areas.tolist() == [300, 200, 900]
    assert len(data.faults) == 0


def test_a_missing_box_is_taken_from_its_outline(make_set: MakeSet, content: dict[str, Any]) -> None:
    del content["annotations"][1]["bbox"]
    content["annotations"][1]["segmentation"] = [[10.5, 8, 30.5, 8, 30.5, 20], [12, 12, 14, 24, 12, 20]]
    data = read(make_set, content)
    np.testing.assert_allclose(data.boxes[0], [10.5, 8, 30.5, 24])
    assert data.faults.counts == {"boxes that are missing, taken from the outline": 1}
    content["annotations"][1]["segmentation"] = {"counts": "x", "size": [48, 64]}
    assert read(make_set, content).faults.counts == {"dropped, whose box is not four finite numbers": 1}


def test_boxes_in_fractions_break_training(make_set: MakeSet, content: dict[str, Any]) -> None:
    for row in content["annotations"]:
        row["bbox"] = [0.25, 0.25, 0.5, 0.25]
    with pytest.raises(UserError, match=r"2 of 2 boxes of .*:1, annotation 7 are fractions of the image"):
        read(make_set, content)
    gathered = read(make_set, content, faults=Faults(gather=True)).faults
    assert gathered.breaking == {"boxes that are fractions of the image (0 to 1) instead of pixels"}
    assert not any("under a pixel" in kind for kind in gathered.counts)


def test_boxes_under_a_pixel_are_told(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["annotations"][1]["bbox"] = [10, 8, 0.4, 16]
    assert read(make_set, content).faults.counts["boxes under a pixel"] == 1
    content["annotations"][0]["bbox"] = [10, 8, 5, 0.5]
    with pytest.raises(UserError, match=r"2 of 2 boxes of .* under a pixel wide or high"):
        read(make_set, content)


def test_corners_instead_of_sides_are_refused(make_set: MakeSet, content: dict[str, Any]) -> None:
    rows = [[20, 10, 60, 40], [30, 30, 64, 48], [5, 4, 30, 20], [40, 20, 50, 44]]
    content["annotations"] = [
        {"id": i, "image_id": 30, "category_id": 3, "bbox": row} for i, row in enumerate(rows, start=1)
    ]
    with pytest.raises(UserError, match=r"3 of 4 boxes of .* write them as \[x, y, width, height\]"):
        read(make_set, content)
    content["annotations"][0]["bbox"] = [20, 10, 19, 9]  # no second corner: the boxes stick out, and that is all
    data = read(make_set, content)
    assert data.faults.counts["clipped to the image"] == 2


def test_a_set_of_nothing_but_iscrowd_is_told(make_set: MakeSet, content: dict[str, Any]) -> None:
    for row in content["annotations"]:
        row["iscrowd"] = 1
    kinds = read(make_set, content).faults.counts
    assert [kinds[kind] for kind in kinds if "ignored for iscrowd 1" in kind] == [3]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": 3, "name": "cat"}, {"id": 90}], r"categories\[1\] .* without a usable 'name', but nothing"),
        ([{"id": 3, "name": "cat"}, {"id": None, "name": "dog"}], r"categories\[1\] .* without a usable 'id'"),
        (
            [{"id": 3, "name": "cat"}, {"id": "3", "name": "dog"}],
            r"categories\[1\] .* has the id '3' of a category before",
        ),
        ([{"id": 3, "name": "cat"}, {"id": 90, "name": True}], r"categories\[1\] .* 'name', but True"),
    ],
)
def test_categories_are_refused_by_row(make_set: MakeSet, content: dict[str, Any], rows: list[Any], said: str) -> None:
    content["categories"] = rows
    with pytest.raises(UserError, match=said):
        read(make_set, content)


def test_categories_of_one_name_and_names_in_another_form(make_set: MakeSet, content: dict[str, Any]) -> None:
    content["categories"] = [{"id": 0, "name": "caf\u00e9"}, {"id": 3, "name": "cafe\u0301 "}, {"id": 90, "name": 7}]
    faults = Faults(gather=True)
    data = read_coco(*make_set(content), ["caf\u00e9", "7", "cow"], "train", faults)
    assert data.labels.tolist() == [1, 0, 1]
    assert data.categories() == [0, 90, 91]
    assert faults.counts == {
        "category names that differ from names in spaces or Unicode form": 1,
        "categories that have the name of one before, taken as one class": 1,
        "names that are no category of the file": 1,
    }


def voc(folder: Path, objects: str, size: str = "", head: str = "") -> DataSpec:
    import cv2

    for name in ("JPEGImages", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    assert cv2.imwrite(str(folder / "JPEGImages" / "a.jpg"), np.zeros((40, 80, 3), np.uint8))
    content = f"{head}<annotation>{size}{objects}</annotation>"
    (folder / "Annotations" / "a.xml").write_bytes(content.encode("gbk" if "gb2312" in head else "utf-8"))
    names = "['猫', caf\u00e9]"
    (folder / "set.yaml").write_text(f"names: {names}\ntrain: {{images: JPEGImages, annotations: Annotations}}")
    return find_data(folder / "set.yaml")


def voc_object(name: str, difficult: str = "0", box: str = "1 1 20 20") -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def test_a_voc_object_of_two_boxes_is_said(tmp_path: Path) -> None:
    twice = voc_object("猫").replace("</object>", voc_object("", box="30 5 60 20").partition("</difficult>")[2])
    data = load_split(voc(tmp_path, twice + voc_object("猫", box="1 1 9 9")), "train")
    assert data.boxes.tolist() == [[29, 4, 60, 20], [0, 0, 9, 9]]
    assert data.faults.counts == {"of more than one <bndbox>, of which the last was taken": 1}


def test_voc_flags_numbers_and_names(tmp_path: Path) -> None:
    flagged = [voc_object("猫", said) for said in ("Unspecified", "yes", " 1 ", "0", "1.0", "false")]
    data = load_split(voc(tmp_path, "".join(flagged) + voc_object("cafe\u0301", box="1.0 1e0 2.5e1 30")), "train")
    assert data.crowd.tolist() == [False, True, True, False, True, False, False]
    assert data.labels.tolist() == [0] * 6 + [1]
    assert data.boxes[-1].tolist() == [0, 0, 25, 30]
    assert data.faults.counts == {
        "whose difficult is neither 0 nor 1, taken as 0": 1,
        "class names that differ from names in spaces or Unicode form": 1,
    }


@pytest.mark.parametrize(("said", "faults"), [("80.0", 0), (" 80", 0), ("0", 0), ("80px", 1), ("²", 1), ("9" * 30, 1)])
def test_voc_sizes(tmp_path: Path, said: str, faults: int) -> None:
    size = f"<size><width>{said}</width><height>40</height></size>"
    data = load_split(voc(tmp_path, voc_object("猫"), size), "train")
    assert data.sizes.tolist() == [[40, 80]]
    assert len(data.faults) == faults


def test_voc_in_an_encoding_that_the_parser_does_not_know(tmp_path: Path) -> None:
    data = load_split(voc(tmp_path, voc_object("猫"), head='<?xml version="1.0" encoding="gb2312"?>'), "train")
    assert data.labels.tolist() == [0]
    with pytest.raises(UserError, match=r"a\.xml is in an encoding that cannot be read"):
        load_split(voc(tmp_path, "", head='<?xml version="1.0" encoding="klingon"?>'), "train")


@pytest.mark.parametrize(
    ("extra", "ignored", "faults"),
    [
        ({"ignore": "0"}, False, 0),
        ({"ignore": "1"}, True, 0),
        ({"ignore": True}, True, 0),
        ({"ignore": None}, False, 0),
        (None, False, 0),
        ({"ignore": 2}, False, 1),
        ("ignore", False, 1),
    ],
)
def test_crowdhuman_flags(tmp_path: Path, extra: Any, ignored: bool, faults: int) -> None:
    import cv2

    assert cv2.imwrite(str(tmp_path / "7.jpg"), np.zeros((40, 80, 3), np.uint8))
    row = {"ID": 7, "gtboxes": [{"tag": "person", "fbox": [1, 1, 20, 20], "extra": extra}]}
    (tmp_path / "a.odgt").write_text(json.dumps(row))
    (tmp_path / "set.yaml").write_text("train: {images: ., annotations: a.odgt}")
    data = load_split(find_data(tmp_path / "set.yaml"), "train")
    assert data.crowd.tolist() == [ignored]
    assert len(data.faults) == faults
