"""`yoloxkd predict` on an exported file: folders, globs, videos; images, JSON, COCO results, YOLO text."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.cli.test_mistakes import refused
from tests.exporters.tiny import TinyDetector
from yoloxkd import Detector
from yoloxkd.cli import frame_progress, run
from yoloxkd.cli.predicting import PredictionOutputs, _Run
from yoloxkd.cli.prediction_paths import free_targets
from yoloxkd.cli.results import ImageResult, coco_rows, numbered, yolo_text
from yoloxkd.cli.sources import find_sources
from yoloxkd.exporters.onnx import ExportOptions, export_onnx
from yoloxkd.instance_masks import decode_rle, rasterize_polygons
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.types import Detections


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector = TinyDetector(["red", "blue"]).eval()
    return export_onnx(detector, tmp_path_factory.mktemp("model") / "tiny.onnx", ExportOptions(64))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images and a video of 6 frames at 12 frames a second."""
    media = tmp_path / "media"
    media.mkdir()
    rng = np.random.default_rng(0)
    frames = [cv2.resize(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8), (120, 90)) for _ in range(6)]
    cv2.imwrite(str(media / "000000139.png"), frames[0])
    cv2.imwrite(str(media / "000000285.png"), frames[1])
    writer = cv2.VideoWriter(str(media / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 12.0, (120, 90))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return media


def test_a_folder_of_images_and_a_video(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--out", out, "--save-txt", "--save-conf", "--json", out / "rows.json", "--coco", out / "coco.json"]
    assert run([str(a) for a in ["predict", model, folder, *options]]) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "000000139.png", "000000285.png", "clip.mp4", "coco.json", "labels", "rows.json",
    ]  # fmt: skip
    rows = json.loads((out / "rows.json").read_text())
    assert [(Path(r["image"]).name, r.get("frame")) for r in rows] == [
        ("000000139.png", None), ("000000285.png", None), *[("clip.mp4", i) for i in range(6)],
    ]  # fmt: skip
    expected = Detector(model).predict(folder / "000000139.png")[0]
    assert rows[0]["detections"] == expected.as_dicts()
    assert len(expected) > 0
    said = capsys.readouterr().out
    places = [line.split()[0] for line in said.splitlines()]
    assert places == ["1/3", "2/3", "3/3"]
    written = cv2.VideoCapture(str(out / "clip.mp4"))
    assert (written.get(cv2.CAP_PROP_FRAME_COUNT), written.get(cv2.CAP_PROP_FPS)) == (6, 12)
    plain = cv2.VideoCapture(str(folder / "clip.mp4")).read()[1].astype(int)
    assert np.abs(written.read()[1].astype(int) - plain).max() > 60  # something is drawn
    coco = json.loads((out / "coco.json").read_text())
    first = [r for r in coco if Path(r["file_name"]).name == "000000139.png"]
    x1, y1, x2, y2 = expected.boxes[0]
    assert first[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=2e-3)
    assert first[0]["category_id"] == expected.labels[0] + 1
    assert {r["image_id"] for r in coco} == set(range(1, 9))  # a video has no number: places in the list
    label, cx, cy, w, h, score = (float(v) for v in (out / "labels" / "000000139.txt").read_text().split()[:6])
    assert (label, score) == pytest.approx((expected.labels[0], expected.scores[0]), abs=1e-5)
    box = [(cx - w / 2) * 120, (cy - h / 2) * 90, (cx + w / 2) * 120, (cy + h / 2) * 90]
    assert box == pytest.approx(expected.boxes[0].tolist(), abs=1e-3)
    assert (out / "labels" / "clip_000005.txt").is_file()
    assert "6 frames" in said


def test_globs_keep_the_numbers_of_coco_images_and_videos_can_be_cut(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    assert run(["predict", str(model), str(folder / "0*.png"), "--out", str(out), "--coco", str(out / "c.json")]) == 0
    assert {r["image_id"] for r in json.loads((out / "c.json").read_text())} == {139, 285}
    arguments = ["predict", str(model), str(folder / "clip.mp4"), "--out", str(out), "--max-frames", "2"]
    assert run(arguments) == 0
    assert cv2.VideoCapture(str(out / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 2
    (folder / "broken.mp4").write_bytes(b"not a video")
    refused(capsys, ["predict", model, folder / "broken.mp4", "--out", out], "broken.mp4", "not a video")
    refused(capsys, ["predict", model, "97", "--out", out], "camera 97 gives no image")


def test_the_categories_of_coco_are_its_own() -> None:
    labels = np.array([0, 11, 79])
    found = Detections(np.ones((3, 4), np.float32), np.ones(3, np.float32), labels, list(COCO_NAMES))
    rows = coco_rows(ImageResult("a.jpg", None, (9, 9), found))
    assert [row["category_id"] for row in rows] == [1, 13, 90]
    for stems, ids in ((["007", "12"], [7, 7, 7, 12]), (["1", "①"], [1, 1, 1, 2]), (["5", "05"], [1, 1, 1, 2])):
        assert [row["image_id"] for row in numbered(stems, [rows, rows[:1]])] == ids


def test_masks_go_into_every_result() -> None:
    """Run lengths in JSON and COCO results, segments in YOLO text: all of them give the same pixels."""
    mask = np.zeros((1, 90, 120), bool)
    cv2.circle(disc := np.zeros((90, 120), np.uint8), (60, 40), 25, 1, -1)
    mask[0] = disc > 0
    mask[0, 35:45, 55:65] = False
    boxes = np.array([[35, 15, 86, 66]], np.float32)
    one = ImageResult(
        "a.png", None, (90, 120), Detections(boxes, np.array([0.5]), np.array([1]), ["red", "blue"], mask)
    )
    for row in (one.row()["detections"][0]["mask"], coco_rows(one)[0]["segmentation"]):
        assert np.array_equal(decode_rle(row["counts"], *row["size"]), mask[0])
    words = yolo_text(one, scores=True).split()
    assert (words[0], float(words[-1])) == ("1", 0.5)
    points = np.array(words[1:-1], np.float64).reshape(-1, 2) * (120, 90)
    assert np.array_equal(rasterize_polygons([points], 90, 120), mask[0])
    one.detections.masks = np.zeros_like(mask)  # nothing of an object: the outline of its box
    assert len(yolo_text(one).split()) == 9


def test_progress_through_a_video(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["predict", str(model), str(folder / "clip.mp4"), "--out", str(tmp_path / "out")]
    assert run(arguments) == 0
    assert capsys.readouterr().err == ""  # nothing of a short one
    monkeypatch.setattr(frame_progress, "PLAIN_SECONDS", 0.0)
    assert run([*arguments, "--max-frames", "4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert "clip.mp4: frame 2 of 4, " in lines[1]
    assert lines[-1].endswith("frames/s, 0:00 left")


def test_no_pixels_are_kept_of_what_is_done(tmp_path: Path) -> None:
    """A minute of video has thousands of frames, each with masks of its size."""
    (tmp_path / "photo.png").write_bytes(cv2.imencode(".png", np.zeros((90, 120, 3), np.uint8))[1].tobytes())
    seen: list[weakref.ref[np.ndarray]] = []

    def detect(pixels: np.ndarray) -> Detections:
        masks = np.ones((1, 90, 120), bool)
        seen.extend(map(weakref.ref, (pixels, masks)))
        found = Detections(np.ones((1, 4), np.float32), np.ones(1, np.float32), np.zeros(1, np.int64), ["red"], masks)
        found.image = pixels
        return found

    outputs = PredictionOutputs(tmp_path / "out", tmp_path / "r.json", tmp_path / "c.json")
    outputs.out.mkdir()
    run = _Run(detect, outputs)
    run.all(free_targets(find_sources([str(tmp_path / "photo.png")]), outputs.out))
    gc.collect()
    assert len(seen) == 2
    assert [one() for one in seen] == [None, None]
    assert json.loads((tmp_path / "r.json").read_text())[0]["detections"][0]["mask"]["size"] == [90, 120]
    assert json.loads((tmp_path / "c.json").read_text())[0]["image_id"] == 1
