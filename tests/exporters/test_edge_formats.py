"""ncnn, TFLite and ExecuTorch files: through the gate, run in their own runtimes, refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.engine.scenes import scene
from tests.exporters.conftest import CONF, MAX_DET, SIZE
from tests.exporters.test_raw_outputs import Plain
from tests.exporters.test_runtime import assert_same
from tests.exporters.tiny import TinyDetector
from yoloxkd import Detector
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters import EXPORTERS, missing
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.edge_form import INPUT_SCALE, edge_form, scaled_input
from yoloxkd.exporters.ncnn_session import NcnnSession
from yoloxkd.exporters.onnx import ExportOptions, resolved_outputs
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.exporters.target import export_target
from yoloxkd.file_kinds import EXPORTED, exported_format, is_own_export, parity_note, parts_of
from yoloxkd.nn.dense.yolox import YOLOX

FORMATS = [
    pytest.param(
        kind,
        marks=[pytest.mark.skipif(bool(missing(kind)), reason=f"not installed: {', '.join(missing(kind))}"), *marks],
    )
    for kind, marks in (("ncnn", []), ("tflite", [pytest.mark.slow]), ("executorch", [pytest.mark.slow]))
]


def nano() -> YOLOX:
    torch.manual_seed(0)
    return YOLOX(YOLOX.Config(depth=0.33, width=0.125, depthwise=True), ["a", "b"]).eval()


def ncnn_threads(path: Path, threads: int | None) -> int:
    """How many a loaded file runs on."""
    count: int = NcnnSession(path, threads)._net.opt.num_threads
    return count


def test_the_edge_form_gives_the_models_outputs(pixels: Tensor) -> None:
    model = nano()
    plain, edge = Exportable(model), Exportable(model)
    scaled_input(edge_form(edge.detector))
    convolution = edge.detector.get_submodule("backbone.backbone.stem.conv.conv")
    assert isinstance(convolution, nn.Conv2d)
    assert (convolution.kernel_size, convolution.stride, convolution.in_channels) == ((6, 6), (2, 2), 3)
    assert edge.detector.spec.input.bgr is False
    assert edge.detector.spec.input.std == (INPUT_SCALE,) * 3
    assert model.spec.input.bgr is True
    with torch.no_grad():
        for a, b in zip(plain(pixels), edge(pixels), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_a_swap_of_channels_that_no_convolution_reads_stays(detector: TinyDetector, pixels: Tensor) -> None:
    edge = Exportable(detector)  # its first layer reads x / 8
    edge_form(edge.detector)
    assert edge.detector.spec.input.bgr is True


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_detects_what_its_model_detects(kind: str, half: bool, pixels: Tensor, tmp_path: Path) -> None:
    model = Plain().eval()
    path = tmp_path / f"x{EXPORTED[kind]}"
    options = ExportOptions(SIZE, nms=False, raw=True, half=half, conf=CONF, max_det=MAX_DET)
    (tmp_path / "data").mkdir()
    if half and kind == "executorch":
        with pytest.raises(UserError, match=r"no fp16 in format executorch: .*; leave --half out"):
            EXPORTERS[kind](model, path, options, data=scene(tmp_path / "data", images=1))
        return
    assert EXPORTERS[kind](model, path, options, data=scene(tmp_path / "data", images=4)) == path
    note = json.loads(parity_note(path).read_text())
    assert note["passed"] is True
    assert note["locations"] > 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "data",
        f"{path.name}.parity.json",
        *(part.name for part in parts_of(path)),
    }
    if kind == "ncnn":
        assert [ncnn_threads(path, threads) for threads in (None, 3)] == [max(1, (os.cpu_count() or 1) // 2), 3]
    predictor = OnnxPredictor(path, threads=1)
    expected = TorchPredictor(model, CONF, 0.65, MAX_DET)(pixels)
    assert max(map(len, expected)) > 3
    if half:
        assert abs(sum(map(len, predictor(pixels))) - sum(map(len, expected))) <= 3
    else:
        assert_same(predictor(pixels), expected)
    assert is_own_export(path)
    with pytest.raises(UserError, match="was exported for 64x64"):
        predictor(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))


@pytest.mark.slow
@pytest.mark.skipif(bool(missing("ncnn")), reason="ncnn or pnnx is not installed")
def test_a_wrong_ncnn_file_is_not_published_and_a_broken_one_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yoloxkd.exporters import ncnn

    model, path = Plain().eval(), tmp_path / "x.param"
    options = ExportOptions(SIZE, nms=False, raw=True, conf=CONF)
    data = scene(tmp_path, images=2)
    export = EXPORTERS["ncnn"]
    export(model, path, options, data=data)
    honest = ncnn.described_graph

    def wrong(*given: object, **named: object) -> object:
        graph = honest(*given, **named)  # type: ignore[arg-type]
        weight = next(w for w in graph.graph.initializer if w.name.endswith("cls.weight"))
        weight.raw_data = bytes(len(weight.raw_data))
        return graph

    monkeypatch.setattr(ncnn, "described_graph", wrong)
    with pytest.raises(GateError, match=r"x\.param was not written"):
        export(model, path, options, data=data)
    aside = tmp_path / "x.previous.param"
    assert all(part.is_file() for part in parts_of(aside))
    assert not any(part.exists() for part in parts_of(path))
    aside.write_text(aside.read_text().replace("Convolution ", "NoSuchLayer ", 1))
    with pytest.raises(UserError, match=r"previous\.param is not a model that ncnn can load"):
        OnnxPredictor(aside)
    aside.with_suffix(".bin").unlink()
    with pytest.raises(UserError, match=r"lacks x\.previous\.bin beside it"):
        OnnxPredictor(aside)
    renamed = shutil.copy(aside, tmp_path / "x.ncnn")
    with pytest.raises(UserError, match=r"x\.ncnn holds an ncnn model; name it X\.param, with X\.bin and"):
        OnnxPredictor(renamed)


@pytest.mark.parametrize("kind", ["ncnn", "tflite", "executorch"])
def test_what_these_formats_do_not_have(kind: str, tmp_path: Path) -> None:
    model, data = Plain().eval(), scene(tmp_path, images=1)
    export, path = EXPORTERS[kind], tmp_path / f"x{EXPORTED[kind]}"
    with pytest.raises(UserError, match="one image at a time; leave --dynamic out"):
        export(model, path, ExportOptions(SIZE, nms=False, raw=True, dynamic=True), data=data)
    model.spec = replace(model.spec, stable_locations=False)
    with pytest.raises(UserError, match="has NMS inside"):
        export(model, path, ExportOptions(SIZE, nms=False), data=data)
    assert resolved_outputs(None, None, kind) == "raw"
    assert resolved_outputs(None, False, kind) == "locations"
    for given in ({"name": None, "nms": True}, {"name": "detections", "nms": None}):
        with pytest.raises(UserError, match=f"format {kind} has no NMS inside"):
            resolved_outputs(**given, kind=kind)  # type: ignore[arg-type]


def test_a_runtime_is_refused_a_file_that_it_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--device openvino does not read .*x\.param; ncnn can"):
        Detector(tmp_path / "x.param", "openvino")
    with pytest.raises(UserError, match="there is no file"):
        Detector(tmp_path / "x.tflite")


def test_only_files_of_the_format_are_replaced(tmp_path: Path) -> None:
    weights = tmp_path / "best.pt"
    weights.write_bytes(b"weights")
    with pytest.raises(UserError, match=r"x\.onnx should be a file name that ends in \.tflite"):
        export_target(tmp_path / "x.onnx", "best.pt", weights, "tflite")
    (tmp_path / "x.bin").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"x\.bin is there already"):
        export_target(tmp_path / "x.param", "best.pt", weights, "ncnn")
    (tmp_path / "x.param").write_bytes(b"7767517\n1 1\n")
    assert exported_format(tmp_path / "x.param") == "ncnn"
    assert not is_own_export(tmp_path / "x.param")
    assert export_target(tmp_path / "x.param", "best.pt", weights, "ncnn") == tmp_path / "x.param"
    (tmp_path / "y").write_bytes(b"\0\0\0\0TFL3")
    assert exported_format(tmp_path / "y") == "tflite"
    assert not is_own_export(tmp_path / "y")
    (tmp_path / "z").write_bytes(b"<\0\0\0ET12eh00")
    assert exported_format(tmp_path / "z") == "executorch"
    assert not is_own_export(tmp_path / "z")
