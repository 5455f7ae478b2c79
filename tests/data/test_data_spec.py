"""The data YAML: names and files, paths, and a sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.data.conftest import NAMES, MakeSet
from yoloxkd.config.files import cfg_names
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.errors import UserError

GOOD = {"path": ".", "format": "coco", "names": NAMES, "train": {"images": "images", "annotations": "instances.json"}}


def write(folder: Path, **changes: object) -> Path:
    file = folder / "set.yaml"
    content = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_yaml_is_read_relative_to_its_own_folder(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_set()
    (tmp_path / "cfg").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "cfg", path="..")
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = find_data("../cfg/set.yaml")
    assert spec.splits == ["train"]
    data = load_split(spec, "train")
    assert (len(data), data.names, data.split) == (3, NAMES, "train")


@pytest.mark.parametrize("names", [{0: "cat", 1: "dog"}, ["cat", "dog"]])
def test_names_may_be_a_list_or_a_mapping(tmp_path: Path, names: object) -> None:
    assert find_data(write(tmp_path, names=names)).names == NAMES


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({0: "cat", 2: "dog"}, "indices 0 to 1"),
        (["cat", "cat"], "'cat' twice"),
        ([], "list of class names"),
        ("cat", "list of class names"),
    ],
)
def test_names_that_make_no_labels_are_refused(tmp_path: Path, names: object, said: str) -> None:
    with pytest.raises(UserError, match=f"key 'names'.*{said}"):
        find_data(write(tmp_path, names=names))


def test_numbers_are_names_too(tmp_path: Path) -> None:
    assert find_data(write(tmp_path, names=[7, "x"])).names == ["7", "x"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"names": ...}, "lacks the key 'names'"),
        ({"train": {"images": "images"}}, r"lacks the key 'train\.annotations'"),
        ({"nmaes": ["x"]}, "unknown key 'nmaes'.*did you mean 'names'"),
        ({"train": {"image": "x", "annotations": "y", "images": "z"}}, r"unknown key 'train\.image'.*'train\.images'"),
        ({"train": ...}, "give at least one of train, val, test"),
        ({"train": "images"}, "train: {images: FOLDER, annotations: FILE}"),
        ({"train": ["images"]}, "train: {images: FOLDER, annotations: FILE}"),
        ({"format": "csv"}, "format 'csv'; known formats: cityscapes, coco, crowdhuman, voc, yolo"),
        ({"format": "yolo"}, r"format yolo, which reads no 'train\.annotations'"),
        ({"train": {"images": ["a", "b"], "annotations": "x"}}, r"'train\.images'.*should be one name, got 2"),
        ({"train": {"images": "a", "annotations": "x", "labels": "y"}}, r"coco, which reads no 'train\.labels'"),
        ({"path": "nowhere"}, "no folder .*nowhere; correct its 'path'"),
    ],
)
def test_mistakes_end_in_a_sentence(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        find_data(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_format_may_be_left_out_where_it_is_plain(make_set: MakeSet, tmp_path: Path) -> None:
    make_set()
    assert len(load_split(find_data(write(tmp_path, format=...)), "train")) == 3


def test_an_unknown_split_names_those_there_are(make_set: MakeSet, tmp_path: Path) -> None:
    make_set()
    with pytest.raises(UserError, match="no split 'val'; it has train"):
        load_split(find_data(write(tmp_path)), "val")


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown data set 'shapse'; did you mean 'shapes'"):
        find_data("shapse")
    with pytest.raises(UserError, match=r"no data YAML .*none\.yaml"):
        find_data(tmp_path / "none.yaml")


def test_coco_that_is_not_on_disk_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "coco" in cfg_names("data")
    with pytest.raises(UserError, match=r"datasets/coco; to get it, run .*unpack train2017\.zip .* use 'shapes'"):
        find_data("coco")
    (tmp_path / "datasets" / "coco").mkdir(parents=True)
    spec = find_data("coco")
    assert (len(spec.names), spec.splits) == (80, ["train", "val"])
    with pytest.raises(UserError, match=r"instances_val2017\.json"):
        load_split(spec, "val")


@pytest.mark.parametrize(
    ("files", "format"),
    [
        ({"images": "i", "annotations": "a.json"}, "coco"),
        ({"images": "i", "annotations": "a.odgt"}, "crowdhuman"),
        ({"images": "i", "annotations": "Annotations"}, "voc"),
        ({"list": "ImageSets/Main/train.txt"}, "voc"),
        ({"images": "i"}, "yolo"),
        ({"images": ["i", "j"], "labels": "l"}, "yolo"),
        ("images/train", "yolo"),
    ],
)
def test_the_format_is_found_by_itself(tmp_path: Path, files: object, format: str) -> None:
    spec = find_data(write(tmp_path, format=..., names=["person"], train=files))
    assert spec.format == format


def ultralytics(folder: Path, text: str) -> Path:
    (folder / "images" / "train").mkdir(parents=True, exist_ok=True)
    file = folder / "ultra.yaml"
    file.write_text(text)
    return file


def test_an_ultralytics_yaml_is_read_as_it_is(tmp_path: Path) -> None:
    text = """
path: .
train: images/train
val:
  - images/train
  - lists/more.txt
test:  # optional
nc: 2
names:
  0: cat
  1: dog
download: https://example.org/set.zip
roboflow: {workspace: x, version: 3}
"""
    spec = find_data(ultralytics(tmp_path, text))
    assert (spec.format, spec.names, spec.splits) == ("yolo", NAMES, ["train", "val"])
    assert spec.val is not None
    assert spec.val.images == ["images/train", "lists/more.txt"]
    assert spec.root == tmp_path


def test_ultralytics_names_and_paths_in_other_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_data(ultralytics(tmp_path, "train: images/train\nnc: 2")).names == ["class0", "class1"]
    roboflow = find_data(ultralytics(tmp_path, "train: ../images/train\nnames: [cat]"))
    assert roboflow.train is not None
    assert roboflow.train.images == ["images/train"]
    with pytest.raises(UserError, match="nc 3 and gives 2 names"):
        find_data(ultralytics(tmp_path, "train: images/train\nnc: 3\nnames: [cat, dog]"))
    (tmp_path / "work" / "datasets" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    spec = find_data(ultralytics(tmp_path, "path: cats\ntrain: images/train\nnames: [cat]"))
    assert spec.root == tmp_path / "work" / "datasets" / "cats"
    with pytest.raises(UserError, match=r"no folder .*dogs; to get it, unpack https://example\.org/d\.zip there"):
        find_data(ultralytics(tmp_path, "path: dogs\ntrain: images\nnames: [x]\ndownload: https://example.org/d.zip\n"))


@pytest.mark.parametrize("path", ["~nobody-of-this-name", "a" * 300, "a\nb"])
def test_a_path_that_cannot_be_is_one_sentence(tmp_path: Path, path: str) -> None:
    for changes in ({"path": path}, {"path": path, "format": ..., "train": "images"}):
        with pytest.raises(UserError) as caught:
            find_data(write(tmp_path, **changes))
        assert str(caught.value).isprintable()
