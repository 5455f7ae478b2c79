"""A split with too little left is refused, or warned of, in the same words by check, train and val."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import TINY, write_toy
from yoloxkd import Trainer
from yoloxkd.cli import run
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.dataset import DetectionData
from yoloxkd.data.problems import Faults
from yoloxkd.data.sufficiency import refuse_shortage, shortages
from yoloxkd.errors import UserError


def split(boxes: list[list[float]], *, crowd: int = 0, images: int = 10, faults: Faults | None = None) -> DetectionData:
    """`boxes` on the first of some images of 640 px, the first `crowd` of them to be ignored."""
    n = len(boxes)
    return DetectionData(
        names=["a", "b"],
        split="train",
        image_ids=np.arange(images),
        paths=[f"{i}.png" for i in range(images)],
        sizes=np.full((images, 2), 640, np.int32),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        labels=np.arange(n) % 2,
        crowd=np.arange(n) < crowd,
        areas=np.ones(n),
        annotation_ids=np.arange(1, n + 1),
        offsets=np.array([0, *[n] * images]),
        faults=Faults() if faults is None else faults,
    )


BOX = [10.0, 10, 60, 60]
DOT = [10.0, 10, 12, 40]  # 2 px wide


def told(data: DetectionData, imgsz: int | None = 640) -> tuple[bool, str]:
    """Whether it is refused, and what is said first."""
    found = shortages(data, imgsz=imgsz)
    return found[0].stops, found[0].sentence


def test_boxes_of_other_classes_alone_are_said_to_be_that() -> None:
    faults = Faults()
    faults.add("dropped, of a category that is not in names", [], 3)
    stops, sentence = told(split([], faults=faults))
    assert stops
    assert "all 3 boxes are of classes that are not in names; make the names agree" in sentence


def test_enough_is_nothing_to_say() -> None:
    assert shortages(split([BOX] * 4), imgsz=640) == []
    assert shortages(split([BOX]), imgsz=None) == []  # a class that is not there is not measured


@pytest.mark.parametrize(
    ("data", "stops", "words"),
    [
        (split([]), True, "its 10 images have no annotated object"),
        (split([BOX] * 4, crowd=4), True, "all 4 boxes that can be used are marked to be ignored"),
        (split([], faults=Faults({"dropped, of an unknown category": 7})), True, "all 7 boxes were dropped"),
        (split([BOX] * 2, faults=Faults({"dropped, outside the image": 18})), True, "18 of 20 (90%) of the boxes"),
        (split([BOX] * 4, faults=Faults({"dropped, outside the image": 6})), False, "6 of 10 (60%) of the boxes"),
        (split([BOX] * 4, crowd=2), False, "2 of 4 (50%) of the boxes of 'train' are marked to be ignored"),
        (split([BOX] * 4, faults=Faults(images_without_file=9)), True, "9 of 10 (90%) of the images"),
        (split([BOX] * 4, faults=Faults(images_without_file=2)), False, "2 of 10 (20%) of the images"),
        (split([DOT] * 4), True, "4 of 4 (100%) of the objects of 'train' are at most 2 px wide"),
        (split([DOT, BOX, BOX, BOX]), False, "1 of 4 (25%) of the objects"),
        (split([[5, 5, 5.4, 5.3]] * 4), True, "are they fractions of the image"),
        (split([BOX]), False, "1 of the 2 classes have no object in 'train' and cannot be learnt: b"),
    ],
)  # fmt: skip
def test_too_little_is_told_with_counts_and_shares(data: DetectionData, stops: bool, words: str) -> None:
    refused, sentence = told(data)
    assert refused == stops
    assert words in sentence
    warned: list[str] = []
    if stops:
        with pytest.raises(UserError) as caught:
            refuse_shortage(shortages(data, imgsz=640), warned.append)
        assert words in str(caught.value)
    else:
        refuse_shortage(shortages(data, imgsz=640), warned.append)
        assert words in warned[0]


def test_classes_that_are_left_out_on_purpose_and_few_backgrounds_are_no_shortage() -> None:
    faults = Faults({"dropped, of a category that is not in names": 10_000}, images_without_file=1)
    assert shortages(split([BOX] * 4, faults=faults), imgsz=640) == []


def test_size_decides_what_is_too_small() -> None:
    data = split([[0, 0, 8, 8]] * 2)
    assert shortages(data, imgsz=640) == []
    assert told(data, 160)[0]
    assert shortages(data, imgsz=(320, 640)) == []
    assert shortages(data, imgsz=None) == []  # in an evaluation they count as missed


def spoiled(folder: Path, split: str, change: dict[str, Any]) -> Path:
    """The toy data with every annotation of a split changed; no annotation where `change` is empty."""
    toy = write_toy(folder, images=4)
    file = folder / "annotations" / f"{split}.json"
    content = json.loads(file.read_text())
    content["annotations"] = [a | change for a in content["annotations"] if change]
    file.write_text(json.dumps(content))
    return toy


@pytest.mark.parametrize(
    ("where", "change"), [("train", {"iscrowd": 1}), ("train", {"bbox": [5, 5, -2, -2]}), ("val", {})]
)
def test_check_and_train_refuse_in_the_same_words(
    where: str, change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = spoiled(tmp_path / "data", where, change)
    assert run(["data", "check", str(toy), "--imgsz", "64"]) == 2
    checked = capsys.readouterr().out
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        Trainer("yolox-nano", data=str(toy), epochs=1, batch=2, imgsz=64, device="cpu", set=TINY, out=out).fit()
    assert caught.value.exit_code == 2
    words, _, _ = str(caught.value).partition(" (annotations: ")  # the check lists these line by line
    assert words.startswith(("no object is left to train on", "no object is left to evaluate on"))
    assert words in checked
    assert not out.exists()


def test_val_refuses_a_split_without_objects(toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = spoiled(tmp_path / "data", "val", {})
    assert run(["val", str(toy_run / "best.pt"), "--data", str(toy), "--workers", "0"]) == 2
    assert "no object is left to evaluate on in 'val'" in capsys.readouterr().err


def test_a_test_split_without_objects_does_not_break_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "check", str(spoiled(tmp_path / "data", "test", {}))]) == 0
    assert "no object is left to evaluate on in 'test'" in capsys.readouterr().out


def test_images_without_a_label_file_are_counted(tmp_path: Path) -> None:
    toy = find_data(write_toy(tmp_path / "coco", images=4))
    data = load_split(toy, "train")
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "coco" / "images" / "train")
    (tmp_path / "labels" / "0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("names: [red, blue]\ntrain: images\nval: images\n")
    bare = load_split(find_data(tmp_path / "data.yaml"), "train")
    assert (len(bare), bare.faults.images_without_file) == (len(data), 3)
    assert "3 of 4 (75%) of the images of 'train' have no label file" in told(replace(bare, names=["red"]))[1]
