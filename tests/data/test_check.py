"""`yoloxkd data check` and `stats`: every planted fault is found at its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.data.test_convert import rich_set
from yoloxkd.cli import run
from yoloxkd.data import check
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.problems import MISSING, UNREADABLE
from yoloxkd.data.stats import split_stats


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """The rich set with one fault of each kind in train, and an image of train in val."""
    folder = tmp_path / "source"
    rich_set(folder)
    file = folder / "train.json"
    content = json.loads(file.read_text())
    image = content["images"][2]["id"]
    for number, change in enumerate(
        (
            {"bbox": [1, 1, 0, 5]},
            {"bbox": [100, 1, 5, 5]},
            {"bbox": [float("nan"), 1, 5, 5]},
            {"category_id": 99},
            {"image_id": 1234},
        ),
        start=100,
    ):
        row = {"id": number, "image_id": image, "category_id": 7, "bbox": [1, 1, 5, 5]}
        content["annotations"].append(row | change)
    content["annotations"].append({"id": 200, "image_id": image, "category_id": 7, "bbox": [3, 3, 5, 5]})
    content["annotations"].append({"id": 201, "image_id": image, "category_id": 7, "bbox": [3, 3, 5, 5]})
    content["images"].append({"id": 900, "file_name": "gone.png", "height": 40, "width": 40})
    content["images"].append({"id": 901, "file_name": "cut.png", "height": 40, "width": 40})
    content["images"].append({"id": 902, "file_name": "again.png", "height": 37, "width": 61})
    content["images"][1]["width"] = 77
    file.write_text(json.dumps(content, indent=1))
    (folder / "train" / "cut.png").write_bytes((folder / "train" / "0.png").read_bytes()[:200])
    shutil.copy(folder / "train" / "0.png", folder / "train" / "again.png")
    shutil.copy(folder / "train" / "0.png", folder / "val" / "0.png")
    return folder


def line_of(file: Path, text: str) -> int:
    return next(i for i, line in enumerate(file.read_text().splitlines(), start=1) if text in line)


def test_every_fault_is_listed_with_file_and_line(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = broken / "report.json"
    assert run(["data", "check", str(broken / "set.yaml"), "--json", str(report)]) == 2
    shown = capsys.readouterr()
    found: dict[str, Any] = json.loads(report.read_text())
    train = found["splits"]["train"]["faults"]
    assert {kind: fault["count"] for kind, fault in train.items() if "clipped" not in kind} == {
        "dropped, of zero or negative size": 1,
        "dropped, outside the image": 1,
        "dropped, whose box is not four finite numbers": 1,
        "dropped, of an unknown category": 1,
        "dropped, of an unknown image": 1,
        "repeated: the same box of the same class again (kept)": 1,
        MISSING: 1,
        UNREADABLE: 1,
        check.OTHER_SIZE: 1,
        check.TWICE: 1,
        check.LEAK: 1,
    }
    file = broken / "train.json"
    for kind, text in (
        ("dropped, of zero or negative size", '"id": 100'),
        ("dropped, of an unknown image", '"id": 104'),
        ("repeated: the same box of the same class again (kept)", '"id": 201'),
    ):
        (place,) = train[kind]["where"]
        assert (place["file"], place["line"]) == (file.name, line_of(file, text) - 1)
        assert f"{file}:{place['line']}, annotation" in shown.out
    assert {kind for kind, fault in train.items() if fault["breaking"]} == {
        MISSING,
        UNREADABLE,
        check.OTHER_SIZE,
    }
    assert found["breaking"] == 3 == found["splits"]["train"]["breaking"]
    (leak,) = found["splits"]["val"]["faults"][check.LEAK]["where"]
    assert leak["file"].endswith("val/0.png")
    assert leak["note"].endswith(" train/0.png of train")
    assert str(broken) not in report.read_text()
    assert "3 of the" in shown.err
    assert "Traceback" not in shown.err


def test_a_split_that_cannot_be_read_is_a_fault_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rich_set(tmp_path)
    (tmp_path / "train.json").write_text("{")
    assert run(["data", "check", str(tmp_path / "set.yaml")]) == 2
    shown = capsys.readouterr().out
    assert "train.json is not valid JSON" in shown
    assert "val: 2 images, 1 boxes, 2 to ignore" in shown


def test_a_good_set_has_no_fault(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(toy)]) == 0
    assert "train: 24 images, 51 boxes" in capsys.readouterr().out


def test_breaking_faults_do_break_training(broken: Path) -> None:
    """What check calls breaking is what a reader or a loader refuses."""
    from yoloxkd.data.data_spec import find_data
    from yoloxkd.errors import UserError

    with pytest.raises(UserError, match=r"1\.png.* is 61x38 px but .*says 77x38 \(the first of 3"):
        load_split(find_data(broken / "set.yaml"), "train")


def test_stats_count_by_class_and_size_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = rich_set(tmp_path / "source")
    data = load_split(spec, "train")
    stats = split_stats(data)
    real = ~data.crowd
    assert stats.by_class.sum(1).tolist() == np.bincount(data.labels[real], minlength=2).tolist()
    assert stats.by_class[:, 0].sum() == (data.areas[real] < 32**2).sum()
    assert (stats.images, stats.ignored, stats.empty) == (4, 2, 2)
    out = tmp_path / "out"
    assert run(["data", "stats", str(tmp_path / "source" / "set.yaml"), "--out", str(out), "--samples", "3"]) == 0
    assert "dog & cat" in capsys.readouterr().out
    sheet = cv2.imread(str(out / "samples-train.png"))
    assert sheet.shape == (376, 3 * 368 + 8, 3)
    assert cv2.imread(str(out / "chart.png")) is not None
    assert json.loads((out / "stats.json").read_text())["splits"]["val"]["images"] == 2


def test_a_split_of_which_no_image_can_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "list.txt").write_text("images/a.jpg\n")
    (tmp_path / "data.yaml").write_text("names: [person]\ntrain: list.txt\n")
    (report,) = check.check_data(find_data(tmp_path / "data.yaml"))
    assert (report.images, report.breaking, report.faults.counts) == (0, 1, {MISSING: 1})
