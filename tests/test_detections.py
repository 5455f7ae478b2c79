"""`Detections` as a value: rows, loops, joining, drawing, files, other packages."""

from __future__ import annotations

import dataclasses
import doctest
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import yoloxkd
import yoloxkd.detections
from yoloxkd import Detection, Detections, UserError
from yoloxkd.api.given_image import with_origin
from yoloxkd.drawing import class_color
from yoloxkd.types import ImageMeta
from yoloxkd.write_image import write_image

NAMES = ["cat", "dog"]


def three(masks: bool = False) -> Detections:
    boxes = np.array([[0, 0, 10, 10], [5, 5, 20, 20], [2, 3, 4, 6]], np.float32)
    found = Detections(boxes, np.array([0.9, 0.6, 0.3], np.float32), np.array([0, 1, 0]), NAMES)
    if masks:
        found.masks = np.zeros((3, 24, 32), bool)
        for mask, (x1, y1, x2, y2) in zip(found.masks, boxes.astype(int).tolist(), strict=True):
            mask[y1:y2, x1:x2] = True
    return found


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (0, [0]),
        (-1, [2]),
        (np.int64(1), [1]),
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        ([], []),
        ([True, False, True], [0, 2]),
        (np.array([False, True, False]), [1]),
        (np.array([2, 2]), [2, 2]),
    ],
)
def test_rows_of_every_field(rows: Any, wanted: list[int]) -> None:
    found = three(masks=True)
    some = found[rows]
    assert some.names == NAMES
    for name in ("boxes", "scores", "labels", "masks"):
        assert np.array_equal(getattr(some, name), getattr(found, name)[wanted]), name


@pytest.mark.parametrize("row", [3, -4])
def test_a_row_that_is_not_there(row: int) -> None:
    with pytest.raises(IndexError, match="of 3"):
        three()[row]


def test_a_loop_gives_each_object_with_its_name_and_mask() -> None:
    found = list(three(masks=True))
    assert [type(one) for one in found] == [Detection] * 3
    assert [(round(one.score, 3), one.label, one.name) for one in found] == [
        (0.9, 0, "cat"),
        (0.6, 1, "dog"),
        (0.3, 0, "cat"),
    ]
    assert found[1].mask is not None
    assert found[1].mask.sum() == 225
    assert next(iter(three())).mask is None
    assert next(iter(Detections(np.zeros((1, 4)), np.ones(1), np.array([7])))).name == "7"


def test_joined_parts_are_sorted_by_score() -> None:
    found = three(masks=True)
    joined = Detections.concat([found[2], found[0], found[1]])
    assert np.array_equal(joined.boxes, found.boxes)
    assert joined.masks is not None
    assert np.array_equal(joined.masks, found.masks)
    assert len(Detections.concat([])) == 0
    with pytest.raises(UserError, match="different class names"):
        Detections.concat([found, Detections(found.boxes, found.scores, found.labels, ["dog", "cat"])])
    with pytest.raises(UserError, match="with masks and without"):
        Detections.concat([found, three()])


def test_boxes_move_between_input_and_image() -> None:
    found = three().moved(2.0, 3.0, 4.0)
    assert found.boxes[1].tolist() == [13, 14, 43, 44]
    back = found.to_image(ImageMeta(0, "", 18, 100, 2.0, 3.0, 4.0))
    assert back.boxes[1].tolist() == [5, 5, 20, 18]
    with pytest.raises(UserError, match="masks cannot be moved"):
        three(masks=True).moved(2.0)


def test_masks_tint_the_image_and_the_best_is_on_top() -> None:
    image = np.full((240, 320, 3), 100, np.uint8)
    boxes = np.array([[40, 60, 200, 200], [120, 60, 300, 200]], np.float32)
    masks = np.zeros((2, 240, 320), bool)
    masks[0, 100:190, 60:160] = masks[1, 100:190, 150:290] = True
    found = Detections(boxes, np.array([0.9, 0.6]), np.array([0, 1]), NAMES, masks)
    plain = Detections(boxes, found.scores, found.labels, NAMES).plot(image)
    drawn = found.plot(image)
    assert (plain[150, 90] == 100).all()
    assert (image == 100).all()
    assert (drawn[195, 90] == 100).all()
    first, both, second = (drawn[150, x].tolist() for x in (90, 155, 220))
    assert first == pytest.approx(0.55 * 100 + 0.45 * np.array(class_color(0)), abs=1)
    assert second == pytest.approx(0.55 * 100 + 0.45 * np.array(class_color(1)), abs=1)
    assert both == pytest.approx(0.55 * np.array(second) + 0.45 * np.array(class_color(0)), abs=1)
    with pytest.raises(UserError, match=r"masks are \(240, 320\) and the image \(10, 10\)"):
        found.plot(image[:10, :10])


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), "photo.jpg", None])
def test_what_cannot_be_drawn_on_is_said(image: Any) -> None:
    with pytest.raises(UserError, match="uint8 RGB"):
        three().plot(image)


def test_saved_as_rows_and_as_a_image(tmp_path: Path) -> None:
    import cv2

    found = three()
    rows = json.loads(found.save(tmp_path / "new" / "rows.json").read_text())
    assert rows == found.as_dicts()
    assert rows[1] == {"box": [5.0, 5.0, 20.0, 20.0], "score": 0.6, "label": 1, "name": "dog"}
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    stored = cv2.imread(str(found.save(str(tmp_path / "drawn.png"), image)), cv2.IMREAD_COLOR_RGB)
    assert np.array_equal(stored, found.plot(image))
    with pytest.raises(UserError, match=r"save\(path, image\)"):
        found.save(tmp_path / "drawn.jpg")
    with pytest.raises(UserError, match="could not write"):
        found.save(tmp_path / "drawn.unknown", image)
    with pytest.raises(UserError, match="could not write"):
        found.save(tmp_path / "drawn.png" / "rows.json")


def test_the_supervision_package_takes_them() -> None:
    supervision = pytest.importorskip("supervision")
    detections = three(masks=True)
    converted = detections.to_supervision()
    assert isinstance(converted, supervision.Detections)
    for name, values in {"xyxy": detections.boxes, "mask": detections.masks, "confidence": detections.scores}.items():
        np.testing.assert_array_equal(getattr(converted, name), values)
    dogs = converted[converted["class_name"] == "dog"]  # its own indexing takes every field along
    assert (dogs.class_id.tolist(), dogs.mask.sum()) == ([1], 15 * 15)
    back = Detections.from_supervision(dogs, NAMES)
    assert (back.labels.tolist(), back.scores.tolist()) == ([1], dogs.confidence.tolist())
    assert np.array_equal(back.masks, detections[detections.labels == 1].masks)
    blank = np.zeros((24, 32, 3), np.uint8)
    assert supervision.BoxAnnotator().annotate(blank.copy(), converted).any()
    assert len(detections[:0].to_supervision()) == 0


def test_supervision_gets_every_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        three().to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    found = three(masks=True)
    given = found.to_supervision()
    assert np.array_equal(given.xyxy, found.boxes)
    assert np.array_equal(given.mask, found.masks)
    assert given.confidence.tolist() == found.scores.tolist()
    assert given.class_id.tolist() == [0, 1, 0]
    assert given.data["class_name"].tolist() == ["cat", "dog", "cat"]
    back = Detections.from_supervision(given, NAMES)
    for name in ("boxes", "scores", "labels", "masks"):
        assert np.array_equal(getattr(back, name), getattr(found, name)), name
    given.confidence = None
    with pytest.raises(UserError, match="without 'confidence'"):
        Detections.from_supervision(given)


def test_the_example_runs() -> None:
    assert doctest.testmod(yoloxkd.detections, extraglobs={"np": np}).failed == 0
    assert doctest.testmod(yoloxkd.detections, extraglobs={"np": np}).attempted >= 3


def test_everything_a_user_needs_is_in_the_package_and_costs_no_torch() -> None:
    script = "import sys, yoloxkd; assert 'torch' not in sys.modules; yoloxkd.Detections; yoloxkd.UserError\n"
    script += "assert 'torch' not in sys.modules and 'cv2' not in sys.modules\n"
    script += "assert all(getattr(yoloxkd, name) is not None for name in yoloxkd.__all__)\n"
    script += "assert set(yoloxkd.__all__) <= set(dir(yoloxkd))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_drawn_without_the_image_where_it_is_known(tmp_path: Path) -> None:
    array = np.full((24, 32, 3), 90, np.uint8)
    file = tmp_path / "photo.png"
    write_image(file, array)
    for given in (array, str(file), file, Image.fromarray(array), torch.from_numpy(array.transpose(2, 0, 1).copy())):
        (_, origin), *_ = with_origin([given])
        assert origin.image is given  # no copy is held
        found = dataclasses.replace(three(), image=origin)
        assert np.array_equal(found.plot(), three().plot(array))
        assert np.array_equal(found[:1].plot(), three()[:1].plot(array))
        assert found.save(tmp_path / "drawn.png").is_file()
        assert Detections.concat([found, found]).image is origin
        assert Detections.concat([found, found.moved(left=4)]).image is None
        again = pickle.loads(pickle.dumps(found))
        if isinstance(given, str | Path):
            assert np.array_equal(again.plot(), found.plot())
        else:
            with pytest.raises(UserError, match="came without the pixels"):
                again.plot()
    with pytest.raises(UserError, match=r"do not know their image: plot\(image\)"):
        three().plot()


def test_the_origin_of_each_image_given() -> None:
    batch = np.zeros((2, 8, 9, 3), np.uint8)
    for given in (batch, list(batch), iter(batch)):
        origins = [origin.image for _, origin in with_origin(given)]
        assert [np.shares_memory(one, batch[i]) for i, one in enumerate(origins)] == [True, True]
    (_, origin), *_ = with_origin(batch[1])
    assert np.shares_memory(origin.image, batch[1])
