"""Exported files as predictors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.exporters.conftest import CONF, SIZE
from tests.exporters.tiny import TinyDetector
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.errors import UserError
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.types import Detections, Predictor


def assert_same(detections: list[Detections], expected: list[Detections]) -> None:
    assert [len(d) for d in detections] == [len(d) for d in expected]
    for a, b in zip(detections, expected, strict=True):
        assert a.labels.tolist() == b.labels.tolist()
        assert a.names == b.names
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)


@pytest.mark.parametrize("file", ["nms_file", "dynamic_file", "raw_file"])
def test_it_detects_what_the_model_detects(
    file: str, request: pytest.FixtureRequest, detector: TinyDetector, pixels: Tensor
) -> None:
    predictor = OnnxPredictor(request.getfixturevalue(file), threads=1)
    model = TorchPredictor(detector, conf=CONF, iou=0.65, max_det=40)
    assert isinstance(predictor, Predictor)
    assert (predictor.names, predictor.stride, predictor.pad_value) == (model.names, model.stride, model.pad_value)
    assert (predictor.imgsz, predictor.dynamic_batch) == (SIZE, file == "dynamic_file")
    assert_same(predictor(pixels), model(pixels))


@pytest.mark.parametrize("file", ["nms_file", "raw_file"])
def test_a_higher_threshold_and_a_shorter_list_are_those_of_the_model(
    file: str, request: pytest.FixtureRequest, detector: TinyDetector, pixels: Tensor
) -> None:
    path = request.getfixturevalue(file)
    for conf, most in ((0.6, 40), (0.6, 3), (0.99999, 40)):
        expected = TorchPredictor(detector, conf=conf, iou=0.65, max_det=most)(pixels)
        assert_same(OnnxPredictor(path, conf=conf, max_det=most)(pixels), expected)


def test_settings_the_file_cannot_give_are_refused(nms_file: Path) -> None:
    with pytest.raises(UserError, match=r"nothing below a score of 0\.3, but conf 0\.1 .* again with that conf"):
        OnnxPredictor(nms_file, conf=0.1)
    with pytest.raises(UserError, match=r"IoU of 0\.65, but iou 0\.5"):
        OnnxPredictor(nms_file, iou=0.5)
    with pytest.raises(UserError, match="at most 40 detections an image, but 41"):
        OnnxPredictor(nms_file, max_det=41)


def test_a_file_without_nms_takes_any_settings(raw_file: Path, detector: TinyDetector, pixels: Tensor) -> None:
    expected = TorchPredictor(detector, conf=0.05, iou=0.3, max_det=77)(pixels)
    assert_same(OnnxPredictor(raw_file, conf=0.05, iou=0.3, max_det=77)(pixels), expected)


def test_another_size_of_input_is_refused(nms_file: Path, dynamic_file: Path) -> None:
    wide = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    with pytest.raises(UserError, match="exported for 64x64, not 64x96"):
        OnnxPredictor(nms_file)(wide)
    assert len(OnnxPredictor(dynamic_file)(wide)) == 1
    with pytest.raises(UserError, match="multiples of 16, not 64x72"):
        OnnxPredictor(dynamic_file)(torch.zeros(1, 3, 64, 72, dtype=torch.uint8))


def test_an_empty_batch_finds_nothing(nms_file: Path, dynamic_file: Path) -> None:
    none = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
    assert OnnxPredictor(nms_file)(none) == OnnxPredictor(dynamic_file)(none) == []


def test_a_foreign_file_is_told_what_it_lacks(nms_file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(nms_file))
    kept = [p for p in model.metadata_props if p.key not in ("names", "pad_value")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, str(tmp_path / "foreign.onnx"))
    with pytest.raises(UserError, match=r"foreign\.onnx lacks the metadata names, pad_value"):
        OnnxPredictor(tmp_path / "foreign.onnx")


def test_what_is_not_an_onnx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UserError, match=r"text\.onnx is not an ONNX file"):
        OnnxPredictor(tmp_path / "text.onnx")
    with pytest.raises(UserError, match="there is no file"):
        OnnxPredictor(tmp_path / "absent.onnx")
