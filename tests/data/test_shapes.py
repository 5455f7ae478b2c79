"""The built-in set: the same every time, whole or absent, with boxes that fit what is drawn."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from yoloxkd.data import shapes
from yoloxkd.data.data_spec import find_data, load_split
from yoloxkd.data.shape_outlines import OUTLINES
from yoloxkd.errors import UserError
from yoloxkd.instance_masks import decode_rle, rle_extent, unpack_counts

EASY_CLASSES = ["circle", "square", "triangle", "star", "cross", "heart"]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_two_generations_are_equal_and_splits_differ(tmp_path: Path) -> None:
    counts = {"train": 6, "val": 3, "test": 3}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shapes.generate(tmp_path / name / "set", counts)
    first = digest(tmp_path / "a" / "set")
    assert first == digest(tmp_path / "b" / "set")
    assert len(first) == 12 + 3
    assert len({v for k, v in first.items() if k.endswith(".jpg")}) == 12
    assert [f.name for f in (tmp_path / "a").iterdir()] == ["set"]


def test_a_set_that_is_there_already_stays(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mark").write_text("first")
    shapes.generate(tmp_path / "set", {"train": 1})
    assert [f.name for f in tmp_path.rglob("*")] == ["set", "mark"]


@pytest.mark.parametrize(("name", "classes"), [("shapes", list(OUTLINES)), ("shapes-easy", EASY_CLASSES)])
def test_it_is_found_by_name_and_drawn_once(
    name: str, classes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOXKD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 4, "val": 2, "test": 2})
    spec = find_data(name)
    assert spec.splits == ["train", "val", "test"]
    assert spec.names == classes
    data = load_split(spec, "train")
    assert (len(data), len(data.faults)) == (4, 0)
    assert data.read(0).shape == (shapes.SIDE, shapes.SIDE, 3)
    monkeypatch.setattr(shapes, "generate", lambda *_: pytest.fail("drawn twice"))
    assert find_data(name).root == spec.root


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("YOLOXKD_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot make the cache folder .*set YOLOXKD_HOME"):
        find_data("shapes")


def test_drawings_span_scales_counts_and_classes() -> None:
    drawn = [shapes.draw("train", n) for n in range(60)]
    counts = [len(objects) for _, objects in drawn]
    sides = [max(one.box[2:]) for _, objects in drawn for one in objects]
    assert min(counts) <= 1
    assert max(counts) >= 15
    assert min(sides) <= 12
    assert max(sides) > shapes.SIDE / 2
    assert {one.label for _, objects in drawn for one in objects} == set(range(10))
    for image, objects in drawn:
        assert (image.shape, image.dtype) == ((shapes.SIDE, shapes.SIDE, 3), np.uint8)
        for _, (x, y, w, h), _ in objects:
            assert 0 <= x < x + w <= shapes.SIDE
            assert 0 <= y < y + h <= shapes.SIDE


def test_easy_drawings_have_few_large_objects_that_hardly_hide_each_other() -> None:
    drawn = [shapes.draw("train", n, shapes.EASY)[1] for n in range(40)]
    assert {len(objects) for objects in drawn} == {1, 2, 3, 4, 5}
    assert {one.label for objects in drawn for one in objects} == set(range(6))
    # a diamond-like turn of the smallest: its box is at least half its circle's; an object may be cut by the border
    assert min(max(one.box[2:]) for objects in drawn for one in objects) >= shapes.SIDE / 10
    masks = [[decode_rle(one.counts, shapes.SIDE, shapes.SIDE) for one in objects] for objects in drawn]
    area = sum(int(mask.sum()) for image in masks for mask in image)
    seen = sum(int(np.any(image, axis=0).sum()) for image in masks)
    assert seen > 0.9 * area


@pytest.mark.parametrize("name", list(OUTLINES))
def test_outlines_fit_the_unit_circle(name: str) -> None:
    radius = max(np.linalg.norm(contour, axis=1).max() for contour in OUTLINES[name])
    assert 0.9 <= radius <= 1.0 + 1e-9


@pytest.mark.parametrize("name", list(OUTLINES))
def test_a_box_holds_exactly_the_drawn_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object on a flat ground: what differs from the ground is its mask, in a box that it touches at its four sides."""
    label = list(OUTLINES).index(name)
    monkeypatch.setattr(shapes, "_plan", lambda *_: [(label, 40.0)])
    monkeypatch.setattr(shapes, "_background", lambda *_: np.full((shapes.SIDE, shapes.SIDE, 3), 90, np.float32))
    monkeypatch.setattr(shapes, "_finish", lambda _, canvas: canvas)
    image, [(found, (x, y, w, h), counts)] = shapes.draw("train", 3)
    assert found == label
    changed = np.abs(image - 90).sum(-1) > 60
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(drawn - (x, y, x + w, y + h)).max() <= 1
    mask = decode_rle(counts, shapes.SIDE, shapes.SIDE)
    assert (mask & changed).sum() > 0.9 * (mask | changed).sum()
    assert rle_extent(unpack_counts(counts), shapes.SIDE) == (x, y, x + w, y + h)


def test_annotations_are_coco(tmp_path: Path) -> None:
    shapes.generate(tmp_path / "set", {"val": 3})
    content = json.loads((tmp_path / "set" / "annotations" / "val.json").read_text())
    assert set(content) == {"images", "annotations", "categories"}
    assert [image["file_name"] for image in content["images"]] == ["00000.jpg", "00001.jpg", "00002.jpg"]
