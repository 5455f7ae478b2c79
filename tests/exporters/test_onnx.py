"""The exported file: names, shapes, padding and metadata as promised, and the same detections as the model."""

from __future__ import annotations

import json
import platform
import socket
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from tests.exporters.conftest import CONF, MAX_DET, SIZE, exported
from tests.exporters.tiny import TinyDetector
from yoloxkd.errors import UserError
from yoloxkd.exporters.half import to_half
from yoloxkd.exporters.onnx import ExportOptions, export_onnx
from yoloxkd.ops.nms import postprocess


def run(path: Path, images: Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.float().numpy()}), strict=True))


def expected(detector: TinyDetector, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    with torch.no_grad():
        out = detector(images)
    return postprocess(out.boxes, detector.scores(out), conf=CONF, iou=0.65, max_det=MAX_DET)


def assert_same(out: dict[str, np.ndarray], detections: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Counts, order and numbers; the rows past the count are zero boxes, zero scores, label -1."""
    for i, (boxes, scores, labels) in enumerate(detections):
        n = len(scores)
        assert out["counts"][i] == n
        assert out["labels"][i, :n].tolist() == labels.tolist()
        np.testing.assert_allclose(out["scores"][i, :n], scores.numpy(), atol=1e-5)
        np.testing.assert_allclose(out["boxes"][i, :n], boxes.numpy(), atol=1e-3)
        assert (out["boxes"][i, n:] == 0).all()
        assert (out["scores"][i, n:] == 0).all()
        assert (out["labels"][i, n:] == -1).all()


def test_one_image_with_nms(nms_file: Path, detector: TinyDetector, pixels: Tensor) -> None:
    for image in pixels[:, None]:
        out = run(nms_file, image)
        assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
            "boxes": ((1, MAX_DET, 4), np.float32),
            "scores": ((1, MAX_DET), np.float32),
            "labels": ((1, MAX_DET), np.int64),
            "counts": ((1,), np.int64),
        }
        detections = expected(detector, image)
        assert 0 < len(detections[0][1]) < 80
        assert_same(out, detections)


@pytest.mark.slow
def test_another_opset(detector: TinyDetector, pixels: Tensor, tmp_path: Path) -> None:
    path = exported(detector, tmp_path, "x", opset=23)
    assert {o.domain: o.version for o in onnx.load(path).opset_import}[""] == 23
    assert_same(run(path, pixels[:1]), expected(detector, pixels[:1]))
    with pytest.raises(UserError, match=r"cannot be written in opset 17: .*Pad"):
        exported(detector, tmp_path, "y", opset=17)


@pytest.mark.parametrize(("count", "height", "width"), [(1, 64, 64), (5, 64, 64), (3, 32, 96), (2, 16, 16)])
def test_any_batch_and_size_when_dynamic(
    dynamic_file: Path, detector: TinyDetector, pixels: Tensor, count: int, height: int, width: int
) -> None:
    images = torch.nn.functional.interpolate(pixels[:count].float(), (height, width)).to(torch.uint8)
    assert_same(run(dynamic_file, images), expected(detector, images))


@pytest.mark.slow
def test_nothing_found_in_part_of_a_batch_or_all_of_it(tmp_path: Path, pixels: Tensor) -> None:
    detector = TinyDetector(["a", "b"], bias=-3.0).eval()
    with torch.no_grad():
        best = detector.scores(detector(pixels)).amax((1, 2))
    low, high = sorted(best.tolist())[0], sorted(best.tolist())[-1]
    conf = (low + high) / 2
    options = ExportOptions(SIZE, conf=conf, max_det=7, dynamic=True)
    path = export_onnx(detector, tmp_path / "x.onnx", options)
    counts = run(path, pixels)["counts"]
    assert counts.min() == 0
    assert counts.max() > 0
    poorest = int(best.argmin())
    out = run(path, pixels[poorest : poorest + 1])
    assert out["counts"].tolist() == [0]
    assert (out["labels"] == -1).all()


def test_without_nms_every_location_is_given(raw_file: Path, detector: TinyDetector, pixels: Tensor) -> None:
    out = run(raw_file, pixels[:1])
    with torch.no_grad():
        output = detector(pixels[:1])
    assert {k: v.shape for k, v in out.items()} == {"boxes": (1, 80, 4), "scores": (1, 80, 3)}
    np.testing.assert_allclose(out["boxes"], output.boxes.numpy(), atol=1e-3)
    np.testing.assert_allclose(out["scores"], detector.scores(output).numpy(), atol=1e-5)


def test_fp16_keeps_the_interface_and_nearly_the_numbers(
    half_file: Path, detector: TinyDetector, pixels: Tensor
) -> None:
    model = onnx.load(str(half_file))
    out = run(half_file, pixels[:1])
    boxes, scores, _ = expected(detector, pixels[:1])[0]
    n = min(10, len(scores))
    assert out["boxes"].dtype == out["scores"].dtype == np.float32
    assert onnx.TensorProto.FLOAT16 in {i.data_type for i in model.graph.initializer}
    np.testing.assert_allclose(out["scores"][0, :n], scores[:n], atol=5e-3)
    np.testing.assert_allclose(out["boxes"][0, :n], boxes[:n], atol=0.5)
    assert not np.array_equal(out["scores"][0, :n], scores[:n].numpy())


def test_fp16_stops_at_the_last_convolution(half_file: Path) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(str(half_file)))
    kind = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.value_info, *model.graph.output]}
    kinds = {i.name: i.data_type for i in model.graph.initializer} | kind
    for node in model.graph.node:
        inputs = {kinds.get(name) for name in node.input}
        if node.op_type == "Conv":
            assert inputs == {onnx.TensorProto.FLOAT16}
        if node.op_type in ("NonMaxSuppression", "TopK", "GreaterOrEqual", "Exp"):
            assert onnx.TensorProto.FLOAT16 not in inputs


@pytest.mark.parametrize("file", ["nms_file", "dynamic_file", "raw_file", "half_file"])
def test_the_file_is_valid_self_contained_and_has_no_batch_norm(file: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(file)
    model = onnx.load(str(path), load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    assert {o.domain: o.version for o in model.opset_import}[""] == 18
    assert not [n for n in model.graph.node if n.op_type == "BatchNormalization"]
    assert not [n for n in model.graph.node if n.doc_string or n.metadata_props]


def test_metadata_says_how_to_use_the_file(nms_file: Path) -> None:
    meta = {p.key: p.value for p in onnx.load(str(nms_file)).metadata_props}
    assert json.loads(meta["names"]) == ["red", "blue", "green"]
    assert json.loads(meta["strides"]) == [8, 16]
    assert json.loads(meta["input_size"]) == [SIZE, SIZE]
    assert json.loads(meta["pad_value"]) == [114, 114, 114]
    assert json.loads(meta["letterbox"])["place"] == "top left"
    assert (json.loads(meta["nms"]), json.loads(meta["conf"]), json.loads(meta["max_det"])) == (True, CONF, MAX_DET)
    assert meta["source_sha256"] == "abc123"
    assert "RGB 0..255" in meta["input"]
    assert meta["precision"] == "fp32"
    assert meta["yoloxkd_version"]


def test_a_file_tells_nothing_of_the_machine(
    detector: TinyDetector, half_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((platform, "node"), (socket, "gethostname")):
        monkeypatch.setattr(module, name, lambda: "the-training-machine-7")
    monkeypatch.chdir(tmp_path)
    told = ["the-training-machine-7", str(Path.home()), str(Path(torch.__file__).parent), str(Path(__file__).parent)]
    for file in (exported(detector, tmp_path, "raw", nms=False), half_file):
        data = file.read_bytes()
        assert [text for text in [*told, str(file.parent)] if text.encode() in data] == [], file.name


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    detector = TinyDetector(["a"]).train()
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    export_onnx(detector, tmp_path / "x.onnx", ExportOptions(SIZE, nms=False))
    assert detector.training
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ExportOptions(100), "imgsz 100 is not a multiple of 16"),
        (ExportOptions(0), "imgsz 0"),
        (ExportOptions(64, conf=1.0), "conf 1.0"),
        (ExportOptions(64, iou=0.0), "iou 0.0"),
        (ExportOptions(64, max_det=0), "max_det 0"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, options: ExportOptions, words: str) -> None:
    with pytest.raises(UserError, match=words):
        export_onnx(TinyDetector(["a"]), tmp_path / "x.onnx", options)


def test_fp16_looks_and_samples_in_float32() -> None:
    """A deformable convolution: offsets of a convolution, places, samples, a convolution."""
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    g (float[1,4,16,16] x) => (float[1,4,16,16] y)
    <float[4,4,3,3] first, float[2,4,1,1] look, float[4,4,1,1] last, float[1,16,16,2] cells>
    {
      map = Conv <pads = [1,1,1,1]> (x, first)
      offset = Conv (map, look)
      moved = Transpose <perm = [0,2,3,1]> (offset)
      places = Add (moved, cells)
      samples = GridSample (map, places)
      bent = Relu (samples)
      y = Conv (bent, last)
    }
    """
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {
        "first": rng.normal(size=(4, 4, 3, 3)),
        "look": rng.normal(size=(2, 4, 1, 1)) / 100,
        "last": rng.normal(size=(4, 4, 1, 1)),
    }
    steps = (2 * np.arange(16) + 1) / 16 - 1
    arrays["cells"] = np.stack(np.meshgrid(steps, steps), -1)[None]
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items())
    del model.graph.value_info[:]
    half = onnx.shape_inference.infer_shapes(to_half(model))
    onnx.checker.check_model(half, full_check=True)
    kind = {
        v.name: v.type.tensor_type.elem_type for v in [*half.graph.value_info, *half.graph.input, *half.graph.output]
    }
    kind |= {i.name: i.data_type for i in half.graph.initializer}
    for node in half.graph.node:
        wanted = {"Conv": onnx.TensorProto.FLOAT16, "Relu": onnx.TensorProto.FLOAT16}.get(
            node.op_type, onnx.TensorProto.FLOAT
        )
        if node.op_type not in ("Cast", "Transpose"):
            assert {kind[name] for name in node.input} == {wanted}, node.op_type
    x = rng.normal(size=(1, 4, 16, 16)).astype(np.float32)
    found, exact = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for m in (half, model)
    )
    assert 0 < np.abs(found - exact).max() < 0.05
