"""Files of detectors of which every class of a location counts: in the graph, and in all that read a file without NMS."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from tests.exporters.conftest import CONF, MAX_DET, SIZE, exported
from tests.exporters.test_predict_script import script  # noqa: F401
from tests.exporters.test_runtime import assert_same
from tests.exporters.tiny import TinyDetector
from tests.nn.fpn import narrow
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.errors import UserError
from yoloxkd.exporters.onnx import ExportOptions, export_onnx
from yoloxkd.exporters.parity import check_parity
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.nn.dense.fcos import FCOS

PAIRS = 15
"""Of the fine level's 192 pairs and the coarse level's 48."""
WEB = Path(__file__).resolve().parents[2] / "export" / "web"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def every() -> TinyDetector:
    return TinyDetector(["red", "blue", "green"], pairs=PAIRS).eval()


@pytest.fixture(scope="module")
def raw(every: TinyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(every, tmp_path_factory.mktemp("raw"), "x", nms=False)


@pytest.fixture(scope="module", params=["nms", pytest.param("nms dynamic", marks=pytest.mark.slow), "raw"])
def file(request: pytest.FixtureRequest, every: TinyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "raw":
        return request.getfixturevalue("raw")  # type: ignore[no-any-return]
    return exported(every, tmp_path_factory.mktemp("every"), "x", dynamic="dynamic" in request.param)


def test_a_file_detects_what_its_model_detects(file: Path, every: TinyDetector, pixels: Tensor) -> None:
    predictor, model = OnnxPredictor(file, threads=1), TorchPredictor(every, CONF, 0.65, MAX_DET)
    expected = model(pixels)
    best_class = TorchPredictor(TinyDetector(every.names).eval(), CONF, 0.65, MAX_DET)(pixels)
    assert [d.labels.tolist() for d in expected] != [d.labels.tolist() for d in best_class]
    assert max(len(d) for d in expected) < MAX_DET
    assert_same(predictor(pixels), expected)
    report = check_parity(every, file, pixels.split(2))
    assert report.faults() == []
    assert report.found.detections == sum(map(len, expected))
    if predictor.dynamic_size:
        wide = torch.nn.functional.interpolate(pixels.float(), (32, 112)).to(torch.uint8)
        assert_same(predictor(wide), model(wide))


def test_the_gate_tells_a_file_of_the_other_rule(every: TinyDetector, nms_file: Path, pixels: Tensor) -> None:
    assert check_parity(every, nms_file, [pixels]).faults() != []


def test_the_script_finds_what_the_model_finds(
    script: ModuleType,  # noqa: F811
    file: Path,
    every: TinyDetector,
    pixels: Tensor,
) -> None:
    model = script.Model(str(file), conf=0.5)
    for image, expected in zip(pixels, TorchPredictor(every, 0.5, 0.65, MAX_DET)(pixels), strict=True):
        boxes, scores, labels = model.predict(image.permute(1, 2, 0).numpy())
        assert len(expected) > 0
        assert labels.tolist() == expected.labels.tolist()
        np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(boxes, expected.boxes.clip(0, SIZE), atol=5e-3)


@pytest.mark.slow
def test_the_cpp_program_finds_what_the_model_finds(
    cpp_program: Path, file: Path, every: TinyDetector, pixels: Tensor, tmp_path: Path
) -> None:
    for image, expected in zip(pixels, TorchPredictor(every, 0.5, 0.65, MAX_DET)(pixels), strict=True):
        cv2.imwrite(str(tmp_path / "x.png"), image.flip(0).permute(1, 2, 0).numpy())
        command = [cpp_program, str(file), str(tmp_path / "x.png"), "0.5"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        detections = json.loads(done.stdout)["detections"]
        assert [d["label"] for d in detections] == expected.labels.tolist()
        np.testing.assert_allclose([d["score"] for d in detections], expected.scores, atol=1e-5)
        np.testing.assert_allclose([d["box"] for d in detections], expected.boxes.clip(0, SIZE), atol=5e-3)


@pytest.mark.skipif(NODE is None, reason="there is no node")
def test_the_page_finds_what_the_model_finds(raw: Path, every: TinyDetector, pixels: Tensor, tmp_path: Path) -> None:
    predictor = OnnxPredictor(raw, threads=1)
    outputs = predictor.run(pixels[:1].numpy())
    numbers = {name: outputs[name].ravel().tolist() for name in ("boxes", "scores")}
    (tmp_path / "outputs.json").write_text(json.dumps(numbers))
    (tmp_path / "run.mjs").write_text(
        f"""
        import {{ readFileSync }} from "node:fs";
        import {{ choose, suppress }} from "{WEB}/detect.js";
        import {{ readMetadata }} from "{WEB}/metadata.js";
        const metadata = readMetadata(readFileSync("{raw}"));
        const {{ boxes, scores }} = JSON.parse(readFileSync("{tmp_path}/outputs.json"));
        const pairs = choose(Float32Array.from(boxes), Float32Array.from(scores), metadata, {CONF});
        console.log(JSON.stringify(suppress(pairs, metadata)));
        """
    )
    done = subprocess.run([str(NODE), str(tmp_path / "run.mjs")], capture_output=True, text=True, check=True)
    found, expected = json.loads(done.stdout), predictor(pixels[:1])[0]
    assert [d["label"] for d in found] == expected.labels.tolist()
    np.testing.assert_allclose([d["score"] for d in found], expected.scores, atol=1e-6)
    np.testing.assert_allclose([d["box"] for d in found], expected.boxes, atol=1e-3)


def with_metadata(source: Path, target: Path, **changes: str | None) -> Path:
    model = onnx.load(str(source))
    texts = {p.key: p.value for p in model.metadata_props} | changes
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {key: value for key, value in texts.items() if value is not None})
    onnx.save(model, str(target))
    return target


def test_a_file_without_the_rule_keeps_the_old_one(
    raw: Path,
    every: TinyDetector,
    pixels: Tensor,
    script: ModuleType,  # noqa: F811
    tmp_path: Path,
) -> None:
    old = with_metadata(raw, tmp_path / "old.onnx", pairs_per_level=None, predictions_per_cell=None)
    best_class = TorchPredictor(TinyDetector(every.names).eval(), CONF, 0.65, MAX_DET)
    assert_same(OnnxPredictor(old)(pixels), best_class(pixels))
    _, scores, labels = script.Model(str(old), conf=CONF).predict(pixels[0].permute(1, 2, 0).numpy())
    expected = best_class(pixels[:1])[0]
    assert labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)


def test_metadata_of_other_levels_are_refused(raw: Path, pixels: Tensor, tmp_path: Path) -> None:
    odd = with_metadata(raw, tmp_path / "odd.onnx", predictions_per_cell="9")
    with pytest.raises(
        UserError,
        match=r"odd\.onnx: its metadata .*9 predictions a cell\) promises 720 locations at 64x64, and its outputs have 80",
    ):
        OnnxPredictor(odd)(pixels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nms", "dynamic", "keys"),
    [(False, False, {}), (True, False, {"points": "corner", "scale_layers": False, "score": "root"})],
    ids=["raw", "NMS, torchvision's conventions"],
)
def test_a_detector_on_an_fpn(nms: bool, dynamic: bool, keys: dict[str, Any], pixels: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = narrow(FCOS, 2, **keys).eval()
    torch.nn.init.normal_(detector.head.conv_cls.weight, std=0.5)
    detector.spec = replace(detector.spec, pairs_per_level=30)
    images = torch.nn.functional.interpolate(pixels.float(), (96, 96)).to(torch.uint8)
    path = export_onnx(detector, tmp_path / "x.onnx", ExportOptions(96, nms=nms, conf=0.01, dynamic=dynamic))
    report = check_parity(detector, path, [images])
    assert report.faults() == []
    assert report.found.detections > 100
