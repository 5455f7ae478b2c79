"""Files are found by their whole name and kind, and what one writer wrote its reader reads back."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from yoloxkd.data.check import LISTED_TWICE, check_data
from yoloxkd.data.convert import convert_data
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.formats.yolo import read_yolo
from yoloxkd.data.io.find_images import LOST_LINKS, OTHER_SPELLING, images_of
from yoloxkd.data.io.image_caches import DiskCache, RamCache
from yoloxkd.data.problems import Faults, Place
from yoloxkd.errors import UserError

ODD = [
    "cat 1.jpg",
    "cat 0.jpg",
    "cat -1.jpg",
    " ahead.jpg",
    "after .jpg",
    "two  blanks.jpg",
    "a.b.c.jpg",
    'it\'s "x".jpg',
    "[b](c){d}.jpg",
    "#1.jpg",
    "100%25 %20.jpg",
    "a&b<c>;d.jpg",
    "back\\slash.jpg",
    "line\nbreak.jpg",
    "tab\tbed.jpg",
    "\u2028sep.jpg",
    unicodedata.normalize("NFC", "Käse.jpg"),
    unicodedata.normalize("NFD", "Größe.jpg"),
    "画像.JPG",
    "UPPER.JPEG",
    "x" * 200 + ".jpg",
    "-rf.png",
    "same.jpg",
    "same.png",
    "Same.jpg",
    os.fsdecode(b"caf\xe9.jpg"),
]


def save(path: Path, shade: int, size: tuple[int, int] = (32, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(path, "PNG")  # the content decides, not the suffix


def odd_set(root: Path) -> Path:
    """A COCO set with an image of each odd name, its shade its position; box i is (i, 1, i + 4, 9)."""
    for i, name in enumerate(ODD):
        save(root / "images" / name, 8 * i)
    content = {
        "images": [{"id": i + 1, "file_name": name, "width": 32, "height": 24} for i, name in enumerate(ODD)],
        "annotations": [
            {"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [i, 1, 4, 8], "area": 32, "iscrowd": 0}
            for i in range(len(ODD))
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (root / "all.json").write_text(json.dumps(content))
    (root / "data.yaml").write_text("format: coco\nnames: [person]\ntrain: {images: images, annotations: all.json}\n")
    return root / "data.yaml"


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("to", ["yolo", "voc", "coco", "crowdhuman"])
def test_odd_names_come_back_from_every_format(tmp_path: Path, to: str, link: bool) -> None:
    result = convert_data(find_data(odd_set(tmp_path / "source")), to, tmp_path / "out", link=link)
    back = convert_data(find_data(result.yaml), "coco", tmp_path / "back")
    for yaml in (result.yaml, back.yaml):
        data = load_split(find_data(yaml), "train")
        assert len(data) == len(ODD) == len(data.boxes)
        shades = [int(data.read(i)[0, 0, 0]) // 8 for i in range(len(data))]
        assert sorted(shades) == list(range(len(ODD)))
        np.testing.assert_allclose(data.boxes[:, 0], np.minimum(shades, 28), atol=1e-6)
        assert not len(data.faults)


def yolo_set(root: Path, images: list[str], labels: list[str]) -> Path:
    for i, name in enumerate(images):
        save(root / "images" / name, 8 * i)
    (root / "labels").mkdir(exist_ok=True)
    for i, name in enumerate(labels):
        (root / "labels" / name).write_text(f"0 0.5 0.5 0.{i + 1} 0.5\n")
    return root / "images"


def read(images: Path, faults: Faults | None = None) -> dict[str, list[float]]:
    """Name of each image -> widths of its boxes, as fractions."""
    data = read_yolo([images], None, ["person"], "train", images.parent, faults)
    return {
        Path(path).name: [round(float(box[2] - box[0]) / 32, 3) for box in data.annotations(i)[0]]
        for i, path in enumerate(data.paths)
    }


def test_suffixes_of_labels_count_in_any_case(tmp_path: Path) -> None:
    images = yolo_set(tmp_path, ["A.JPG", "b.png", "c.jfif", "d.Tif"], ["A.TXT", "b.TxT", "c.txt"])
    assert read(images) == {"A.JPG": [0.1], "b.png": [0.2], "c.jfif": [0.3], "d.Tif": []}


def test_stems_that_differ_in_case_or_normal_form(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    images = yolo_set(
        tmp_path, ["a.jpg", "A.jpg", f"{composed}.jpg", "b.jpg"], ["a.txt", "A.txt", f"{apart}.txt", "B.txt"]
    )
    assert read(images) == {"a.jpg": [0.1], "A.jpg": [0.2], f"{composed}.jpg": [0.3], "b.jpg": [0.4]}
    (tmp_path / "labels" / "a.txt").unlink()
    assert read(images)["a.jpg"] == []  # A.txt is A.jpg's


def test_two_images_with_one_label_file_are_named(tmp_path: Path) -> None:
    images = yolo_set(tmp_path, ["a.jpg", "a.png"], ["a.txt"])
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png have one label file, .*a\.txt"):
        read(images)
    faults = Faults(gather=True)
    read(images, faults)
    assert faults.breaking == {"images that share their label file"}
    (tmp_path / "list.txt").write_text("images/a.png\n")  # a list tells them apart
    assert len(read_yolo([tmp_path / "list.txt"], None, ["person"], "train", tmp_path).boxes) == 1


def test_what_systems_leave_in_folders_is_no_image(tmp_path: Path) -> None:
    extra = ["._a.jpg", ".hidden.jpg", ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg", "__MACOSX/a.jpg", "x.jpg/b.png"]
    images = yolo_set(tmp_path / ".cache" / "set", ["a.jpg", *extra], ["a.txt"])
    (images / "Thumbs.db").write_bytes(b"x")
    (images / ".DS_Store").write_bytes(b"x")
    assert list(read(images)) == ["a.jpg", "b.png"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    images = yolo_set(tmp_path / "set", ["a.jpg", "real/b.jpg"], ["a.txt"])
    store = yolo_set(tmp_path / "store", ["c.jpg", "deep/d.jpg"], [])
    links = {"up": "..", "self": ".", "again": "real", "more": store, "inner": store / "deep", "gone": "nowhere"}
    for name, target in links.items():
        (images / name).symlink_to(target)
    assert sorted(Path(path).name for path in images_of([images], images)) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    (images / "linked.jpg").symlink_to("nowhere.jpg")
    with pytest.raises(UserError, match=r"linked\.jpg.* is a link to nowhere\.jpg, which is missing"):
        read(images)


def test_links_that_became_text_are_told(tmp_path: Path) -> None:
    images = yolo_set(tmp_path / "set", ["a.jpg"], ["a.txt"])
    yolo_set(tmp_path / "store", ["c.jpg"], [])
    (images / "more").write_text("../../store/images")
    (images / "README").write_text("pictures")
    faults = Faults()
    read(images, faults)
    assert faults.counts == {LOST_LINKS: 1}
    assert "more, should be a link to ../../store/images" in faults.describe()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_and_labels_of_any_editor(tmp_path: Path, encoding: str, end: str) -> None:
    yolo_set(tmp_path, ["ä b.jpg", "c.jpg"], [])
    (tmp_path / "labels" / "ä b.txt").write_bytes(f"0 0.5 0.5 0.25 0.5{end}0 0.5 0.5 0.5 0.5{end}".encode(encoding))
    (tmp_path / "list.txt").write_bytes(f"images/ä b.jpg{end}{end}./images/c.jpg".encode(encoding))
    assert read(tmp_path / "list.txt") == {"ä b.jpg": [0.25, 0.5], "c.jpg": []}


def test_text_that_is_none(tmp_path: Path) -> None:
    images = yolo_set(tmp_path, ["a.jpg"], [])
    (tmp_path / "labels" / "a.txt").write_bytes("0 0.5 0.5 0.25 0.5".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"a\.txt is not text in UTF-8"):
        read(images)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (tmp_path / "labels" / "a.txt").write_text(pointer)
    with pytest.raises(UserError, match=r"label file .*a\.txt is a Git LFS pointer.*git lfs pull"):
        read(images)
    (tmp_path / "all.json").write_text(pointer)
    (tmp_path / "data.yaml").write_text("names: [person]\ntrain: {images: images, annotations: all.json}\n")
    with pytest.raises(UserError, match=r"annotation file .*all\.json is a Git LFS pointer"):
        load_split(find_data(tmp_path / "data.yaml"), "train")


SPELLINGS = {
    "images\\a b.jpg": True,
    "images/a%20b.jpg": True,
    "images/A B.JPG": True,
    "images/a b.jpg ": True,
    "D:\\set\\a b.jpg": "backslashes",
    "images/none%20such.jpg": "codes",
    "file:///nowhere/a.jpg": "URL",
    "images/nul\0.jpg": "is missing",
    "images/half \ud83d.jpg": "is missing",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_names_of_other_systems_are_found_or_hinted_at(tmp_path: Path, name: str) -> None:
    save(tmp_path / "images" / "a b.jpg", 8)
    content = {
        "images": [{"id": 1, "file_name": name, "width": 32, "height": 24}],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    (tmp_path / "data.yaml").write_text("names: [person]\ntrain: {images: ., annotations: all.json}\n")
    spec, hint = find_data(tmp_path / "data.yaml"), SPELLINGS[name]
    if isinstance(hint, str):
        with pytest.raises(UserError, match=hint):
            load_split(spec, "train")
    else:
        data = load_split(spec, "train")
        assert Path(data.paths[0]) == tmp_path / "images" / "a b.jpg"
        assert data.faults.counts == {OTHER_SPELLING: 1}


def test_urls_and_absolute_paths_are_found(tmp_path: Path) -> None:
    images = yolo_set(tmp_path, ["a b.jpg"], [])
    place = images / "a b.jpg"
    for line in (str(place), place.as_uri(), f"file://{place}", f'"{place}"'):
        (tmp_path / "list.txt").write_text(line + "\n")
        assert images_of([tmp_path / "list.txt"], tmp_path / "elsewhere") == [str(place)], line


def voc_set(root: Path, images: list[str], xml: dict[str, str], lines: str) -> Path:
    for i, name in enumerate(images):
        save(root / "JPEGImages" / name, 8 * i)
    (root / "Annotations").mkdir()
    for i, (name, filename) in enumerate(xml.items()):
        box = f"<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{i + 5}</xmax><ymax>9</ymax></bndbox>"
        text = f"<annotation><filename>{filename}</filename><object><name>person</name>{box}</object></annotation>"
        (root / "Annotations" / name).write_text(text)
    (root / "list.txt").write_text(lines)
    (root / "data.yaml").write_text(
        "format: voc\nnames: [person]\n"
        "train: {list: list.txt, images: JPEGImages, annotations: Annotations}\n"
        "val: {images: JPEGImages, annotations: Annotations}\n"
    )
    return root / "data.yaml"


def read_voc(yaml: Path, split: str = "train") -> dict[str, int]:
    """Name of each image -> width of its first box, 0 without."""
    data = load_split(find_data(yaml), split)
    boxes = [data.annotations(i)[0] for i in range(len(data))]
    return {Path(p).name: int(b[0, 2]) if len(b) else 0 for p, b in zip(data.paths, boxes, strict=True)}


def test_only_a_last_column_is_no_part_of_a_listed_name(tmp_path: Path) -> None:
    names = ["cat.jpg", "cat 1.jpg", "dog.jpg", "red fox.JPG", "wolf.png"]
    xml = {"cat.XML": "", "cat 1.xml": "", "dog.xml": "", "red fox.xml": "", "wolf.xml": ""}
    yaml = voc_set(tmp_path, names, xml, "cat 1\ncat -1\ndog  1\nred fox -1\nwolf.png\t0\n")
    assert read_voc(yaml) == {"cat 1.jpg": 6, "cat.jpg": 5, "dog.jpg": 7, "red fox.JPG": 8, "wolf.png": 9}
    (tmp_path / "list.txt").write_text("cat 1\ncat 2\n")
    with pytest.raises(UserError, match=r"cat 2\.jpg.* is missing"):
        read_voc(yaml)


def test_stems_that_occur_twice_are_told_apart_by_filename(tmp_path: Path) -> None:
    yaml = voc_set(tmp_path, ["a.jpg", "a.png"], {"a.xml": "a.png"}, "a\n")
    assert read_voc(yaml) == {"a.png": 5}
    assert read_voc(yaml, "val") == {"a.jpg": 0, "a.png": 5}
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation/>")
    for split in ("train", "val"):
        with pytest.raises(UserError, match=r"a\.jpg and .*a\.png have one annotation file, .*a\.xml"):
            read_voc(yaml, split)


def test_an_image_listed_twice_is_told_as_that(tmp_path: Path) -> None:
    yolo_set(tmp_path, ["a.jpg", "b.jpg"], ["a.txt", "b.txt"])
    (tmp_path / "list.txt").write_text("images/a.jpg\nimages/b.jpg\nimages/a.jpg\n")
    (tmp_path / "data.yaml").write_text("names: [person]\ntrain: list.txt\n")
    (report,) = check_data(find_data(tmp_path / "data.yaml"))
    assert report.faults.counts == {LISTED_TWICE: 1}
    assert report.faults.examples[LISTED_TWICE] == [Place(str(tmp_path / "images" / "a.jpg"))]


def test_ids_of_several_images_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "Images" / "a.jpg", 1)
    save(tmp_path / "Images" / "a.png", 2)
    (tmp_path / "train.odgt").write_text('{"ID": "a", "gtboxes": []}\n', encoding="utf-8-sig")
    (tmp_path / "data.yaml").write_text("train: {images: Images, annotations: train.odgt}\n")
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png both are the image of the ID 'a'"):
        load_split(find_data(tmp_path / "data.yaml"), "train")


def test_caches_keep_images_of_any_name(tmp_path: Path) -> None:
    data = load_split(find_data(odd_set(tmp_path)), "train")
    plain = [data.read(i) for i in range(len(data))]
    (tmp_path / "cache").mkdir()
    for cache in (RamCache(data), DiskCache(data, tmp_path / "cache"), DiskCache(data, tmp_path / "cache")):
        for i, picture in enumerate(plain):
            np.testing.assert_array_equal(cache.read(i, 1)[0], picture)


@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_normal_forms_of_listed_names(tmp_path: Path, listed: Literal["NFC", "NFD"]) -> None:
    """macOS writes names apart (NFD) that annotation files mostly hold composed (NFC)."""
    there = unicodedata.normalize("NFD" if listed == "NFC" else "NFC", "Größe é")
    said = unicodedata.normalize(listed, there)
    assert said != there
    yaml = voc_set(tmp_path, [f"{there}.jpg"], {f"{said}.xml": ""}, said)
    assert read_voc(yaml) == read_voc(yaml, "val") == {f"{there}.jpg": 5}
    rows = [{"id": 1, "file_name": f"{said}.jpg", "width": 32, "height": 24}]
    content = {"images": rows, "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "coco.yaml").write_text("names: [person]\ntrain: {images: JPEGImages, annotations: a.json}\n")
    assert read_voc(tmp_path / "coco.yaml") == {f"{there}.jpg": 0}
    (tmp_path / "a.odgt").write_text(json.dumps({"ID": said, "gtboxes": []}))
    (tmp_path / "crowd.yaml").write_text("train: {images: JPEGImages, annotations: a.odgt}\n")
    assert read_voc(tmp_path / "crowd.yaml") == {f"{there}.jpg": 0}
    (tmp_path / "paths.txt").write_text(f"JPEGImages/{said}.jpg")
    assert images_of([tmp_path / "paths.txt"], tmp_path) == [str(tmp_path / "JPEGImages" / f"{there}.jpg")]
