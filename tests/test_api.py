"""`Detector` and `Trainer` as a Python user types them, on real weights and images where they are at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import TINY
from tests.exporters.tiny import TinyDetector
from yoloxkd import Detections, Detector, Trainer
from yoloxkd.engine.callbacks.early_stopping import EarlyStopping
from yoloxkd.errors import UserError
from yoloxkd.exporters.onnx import ExportOptions, export_onnx
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.ops.boxes import pairwise_iou


@pytest.fixture(scope="module")
def coco_yaml(coco_mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("yaml") / "coco_mini.yaml"
    lines = [f"path: {coco_mini}", "format: coco", f"names: [{', '.join(COCO_NAMES)}]"]
    lines += [f"{s}: {{images: images/{s}, annotations: annotations/{s}.json}}" for s in ("train", "val")]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_predict_reproduces_the_published_detections(shared: Path, coco_mini: Path, nano_weights: Path) -> None:
    """The reference was made by another program from the same weights: every confident detection must be there."""
    reference = json.loads((shared / "weights" / "yolox_nano_coco_mini_val_dets.json").read_text())
    truth = json.loads((coco_mini / "annotations" / "val.json").read_text())
    categories = sorted(c["id"] for c in truth["categories"])
    detector = Detector(nano_weights, "cpu")
    assert detector.imgsz == 416
    images = truth["images"][::5]
    found = detector.predict([coco_mini / "images" / "val" / i["file_name"] for i in images], conf=0.01, iou=0.65)
    compared = 0
    for image, mine in zip(images, found, strict=True):
        for row in (r for r in reference if r["image_id"] == image["id"] and r["score"] > 0.02):
            x, y, w, h = row["bbox"]
            same = mine.labels == categories.index(row["category_id"])
            close = np.abs(mine.scores - row["score"]) < 2e-3
            # the reference keeps boxes that reach out of the image
            box = torch.tensor([[x, y, x + w, y + h]]).clamp(min=0)
            box[:, 0::2], box[:, 1::2] = box[:, 0::2].clamp(max=image["width"]), box[:, 1::2].clamp(max=image["height"])
            overlap = pairwise_iou(torch.from_numpy(mine.boxes).double(), box.double()).squeeze(1).numpy()
            assert (same & close & (overlap > 0.98)).any(), (image["file_name"], row)
            compared += 1
    assert compared > 100


def test_the_published_figure(coco_yaml: Path, nano_weights: Path) -> None:
    metrics = Detector(nano_weights, "cpu").val(str(coco_yaml), workers=0)
    assert 100 * metrics["AP"] == pytest.approx(31.96, abs=0.05)
    assert 100 * metrics["AP50"] == pytest.approx(47.55, abs=0.1)


def test_rectangular_batches_find_what_squares_do(coco_yaml: Path, nano_weights: Path) -> None:
    metrics = Detector(nano_weights, "cpu").val(str(coco_yaml), workers=0, batch=8, rect=True)
    assert 100 * metrics["AP"] == pytest.approx(33.14, abs=0.05)


def test_settings_that_cannot_be_are_one_sentence(toy: Path, toy_run: Path) -> None:
    with pytest.raises(UserError, match=r"'val\.rect' in the settings of an evaluation.*boolean"):
        Detector(toy_run / "best.pt", "cpu").val(str(toy), rect="maybe")


def test_predict_takes_files_arrays_and_one_of_them(toy: Path, toy_run: Path) -> None:
    file = toy.parent / "images" / "val" / "0.png"
    array = cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)
    detector = Detector(toy_run / "best.pt", "cpu")
    assert detector.names == ["red", "blue"]
    assert detector.imgsz == 64
    many = detector.predict([str(file), file, array], conf=0.0)
    one = detector.predict(array, conf=0.0)
    assert len(many) == 3
    assert len(one) == 1
    for other in many:
        assert isinstance(other, Detections)
        assert np.array_equal(other.boxes, one[0].boxes)
        assert np.array_equal(other.plot(), one[0].plot(array))
    assert len(one[0]) > 0
    assert (np.diff(one[0].scores) <= 0).all()
    assert one[0].boxes.min() >= 0
    assert one[0].boxes.max() <= 96


def test_an_exported_file_is_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export_onnx(TinyDetector(["red", "blue"]).eval(), tmp_path / "tiny.onnx", ExportOptions(64))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Detector(file).device == torch.device("cpu")
    for device in ("cuda", "0", "mps"):
        with pytest.raises(UserError, match=f"runs on the CPU: leave --device {device} out"):
            Detector(file, device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_a_device_is_named_as_torch_users_do(device: Any, toy_run: Path) -> None:
    assert Detector(toy_run / "best.pt", device).device.type in ("cpu", "cuda")


def test_arguments_of_another_kind_are_one_sentence(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    model = toy_run / "best.pt"
    detector = Detector(model, "cpu")
    picture = cv2.imread(str(toy.parent / "images" / "val" / "0.png"))
    found = detector.predict(picture, conf=0.0)[0]
    attempts: list[tuple[Callable[[], Any], str]] = [
        (lambda: Detector(model, 1.5), "device should be a name"),  # type: ignore[arg-type]
        (lambda: Detector(model, True), "device should be a name"),
        (lambda: detector.val(str(toy), batch=0), "batch should be an integer from 1 to"),
        (lambda: detector.val(str(toy), workers=-1), "workers should be an integer from 0 to"),
        (lambda: detector.val(None), "data should be a name or a path, got None"),  # type: ignore[arg-type]
        (lambda: detector.export(5), "should be a name or a path, got 5"),  # type: ignore[arg-type]
        (lambda: detector.predict("a\0.png"), r"cannot read the image 'a\\x00\.png'"),
        (lambda: detector.predict(""), "cannot read the image ''"),
        (lambda: found.save(None), "save needs the name of a file"),  # type: ignore[arg-type]
        (lambda: Trainer("yolox-nano", set="a.b=1"), "set should be a mapping"),
        (lambda: Trainer("yolox-nano", set=[1]), "set should be a mapping"),  # type: ignore[list-item]
        (lambda: Trainer("yolox-nano", callbacks=None), "callbacks should be a list"),  # type: ignore[arg-type]
        (lambda: Trainer("yolox-nano", callbacks=[EarlyStopping]), r"made by EarlyStopping\(\)"),  # type: ignore[list-item]
        (lambda: Trainer("yolox-nano", callbacks=[5]), "got 5"),  # type: ignore[list-item]
    ]
    for attempt, words in attempts:
        with pytest.raises(UserError, match=words):
            attempt()


def test_a_misspelt_keyword_is_answered_with_the_nearest(toy: Path, toy_run: Path) -> None:
    detector = Detector(toy_run / "best.pt")
    options: dict[str, Any] = {"epoch": 3}
    with pytest.raises(UserError, match=re.escape("Trainer takes no 'epoch'; did you mean 'epochs'?")):
        Trainer(student="yolox-nano", **options)
    with pytest.raises(UserError, match=re.escape("Trainer takes no 'epoch'; did you mean 'epochs'?")):
        detector.train(data=str(toy), **options)
    options = {"cnof": 0.5}
    with pytest.raises(UserError, match=re.escape("Detector.predict takes no 'cnof'; did you mean 'conf'?")):
        detector.predict([], **options)
    with pytest.raises(UserError, match=re.escape("did you mean 'val.conf'?")):
        detector.val(data=str(toy), **options)
    with pytest.raises(UserError, match=re.escape("did you mean 'export.method'?")):
        detector.export(int8=True, metod="minmax")
    with pytest.raises(UserError, match=re.escape("Detector.export takes no 'imgz'; did you mean 'imgsz'?")):
        detector.export(imgz=64)


@pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8)])
def test_arrays_of_another_kind_are_refused(bad: np.ndarray, toy_run: Path) -> None:
    with pytest.raises(UserError, match="uint8 RGB"):
        Detector(toy_run / "best.pt", "cpu").predict(bad)


def test_a_student_starts_from_official_weights_of_other_classes(
    toy: Path, nano_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {k: v for k, v in TINY.items() if k != "student.width"}
    out = tmp_path / "run"
    Trainer(str(nano_weights), data=str(toy), epochs=1, batch=4, imgsz=64, device="cpu", set=settings, out=out).fit()
    log = (out / "train.log").read_text()
    assert "class predictors left untrained because the classes differ" in log
    assert "896559 of " in log


def test_a_coco_teacher_with_other_classes_is_paired_by_name(toy: Path, nano_weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"student": "yolox-nano", "data": str(toy), "epochs": 1, "batch": 4, "imgsz": 64, "device": "cpu"}
    Trainer(**options, teacher=str(nano_weights), kd="pgd", set=TINY, out=out).fit()
    log = (out / "train.log").read_text()
    assert "0 known to the teacher; by localization only: red, blue" in log


@pytest.mark.slow
def test_an_export_equals_its_model_and_is_loaded_once(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    detector = Detector(toy_run / "best.pt", "cpu")
    file = detector.export(tmp_path / "x.onnx", verify=str(toy))
    exported = Detector(file)
    assert exported.names == detector.names
    picture = toy.parent / "images" / "val" / "1.png"
    for conf in (0.01, 0.02):
        mine, other = detector.predict(picture, conf=conf)[0], exported.predict(picture, conf=conf)[0]
        assert len(mine) == len(other)
        np.testing.assert_allclose(mine.scores, other.scores, atol=1e-4)
    assert detector.val(str(toy), workers=0)["AP"] == pytest.approx(exported.val(str(toy), workers=0)["AP"], abs=1e-6)
    with pytest.raises(UserError, match="exported for 64 px"):
        exported.predict(picture, imgsz=96)
    for shape in ({"rect": True}, {"imgsz": (32, 64)}):
        with pytest.raises(UserError, match=r"takes inputs of 64x64 px alone.*--dynamic"):
            exported.val(str(toy), **shape)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="exported file already"):
        exported.export(tmp_path / "y.onnx")
    file.unlink()  # every further call works on what is loaded, at any threshold
    many, few = exported.predict(picture, conf=0.01)[0], exported.predict(picture, conf=0.05)[0]
    assert len(many) > len(few)
    assert len(few) == int((many.scores >= 0.05).sum())
    with pytest.raises(UserError, match="export it again"):
        exported.predict(picture, conf=0.001)


def test_a_detector_is_called_like_predict_and_trained_like_a_trainer(toy: Path, toy_run: Path, tmp_path: Path) -> None:
    detector = Detector(toy_run / "best.pt", "cpu")
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    for called, predicted in zip(detector(image, conf=0.01), detector.predict(image, conf=0.01), strict=True):
        assert called.as_dicts() == predicted.as_dicts()
    before = {name: value.clone() for name, value in detector.network.state_dict().items()}
    options = {"data": str(toy), "epochs": 1, "batch": 8, "imgsz": 64, "device": "cpu", "set": TINY}
    fit = detector.train(**options, out=tmp_path / "run")
    assert all(torch.equal(before[name], value) for name, value in detector.network.state_dict().items())
    assert fit.metrics["AP"] > 0.05, "it did not start from the detector's weights"
    assert Detector(fit.best, "cpu").names == detector.names
    with pytest.raises(UserError, match="leave out student"):
        detector.train(student="yolox-s", data=str(toy))
