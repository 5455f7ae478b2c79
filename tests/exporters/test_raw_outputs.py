"""Files of raw head outputs: one tensor a kind and level, decoded by all readers to what the model detects."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from tests.exporters.conftest import CONF, MAX_DET, SIZE
from tests.exporters.test_every_class import NODE, WEB, with_metadata
from tests.exporters.test_predict_script import script  # noqa: F401
from tests.exporters.test_runtime import assert_same
from tests.exporters.tiny import TinyDetector
from tests.nn.fpn import SHALLOW, narrow
from yoloxkd.config.quantization import Quantization
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.errors import UserError
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.half import to_half
from yoloxkd.exporters.int8 import Int8Quantizer
from yoloxkd.exporters.onnx import ExportOptions, described_graph, export_onnx
from yoloxkd.exporters.parity import check_parity
from yoloxkd.exporters.raw_graph import RawHead, describe_head
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.exporters.sensitivity import layer_costs
from yoloxkd.nn.dense.atss import ATSS
from yoloxkd.nn.dense.autoassign import AutoAssign
from yoloxkd.nn.dense.ddod import DDOD
from yoloxkd.nn.dense.dense_detector import Maps, Predictions
from yoloxkd.nn.dense.fcos import FCOS
from yoloxkd.nn.dense.gfl import GFL
from yoloxkd.nn.dense.reppoints import RepPoints
from yoloxkd.nn.dense.retinanet import RetinaNet
from yoloxkd.nn.dense.yolox import YOLOX, decode
from yoloxkd.types import Grid

RAW = {"nms": False, "raw": True}


class Plain(TinyDetector):
    """The tiny detector with YOLOX's predictors and box code, for it is quick to export."""

    def __init__(self) -> None:
        super().__init__(["red", "blue", "green"])
        self.spec = replace(self.spec, quality="objectness")
        self.cls, self.obj, self.box = (nn.Conv2d(16, outputs, 1) for outputs in (3, 1, 4))
        for conv in (self.cls, self.obj, self.box):
            nn.init.normal_(conv.weight, std=0.3)

    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        return Predictions([self.cls(x) for x in cls], [self.box(x) for x in reg], [self.obj(x) for x in reg])

    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        return decode(raw, grid.points, grid.point_strides)


@pytest.fixture(scope="module")
def plain() -> Plain:
    return Plain().eval()


def lively(detector: Any) -> Any:
    """The detector with predictors that differ from place to place."""
    torch.manual_seed(1)
    for name, parameter in detector.named_parameters():
        if "pred" in name or any(part in name for part in ("conv_cls", "conv_reg", "_cls.", "_reg.", "centerness")):
            nn.init.normal_(parameter, std=0.3)
    return detector.eval()


@pytest.fixture(scope="module")
def graph(plain: Plain) -> onnx.ModelProto:
    return described_graph(plain, ExportOptions(SIZE, conf=CONF, max_det=MAX_DET, **RAW))


@pytest.fixture(scope="module")
def file(graph: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "raw.onnx"
    onnx.save(graph, str(path))
    return path


@pytest.fixture(scope="module")
def gfl() -> GFL:
    detector: GFL = lively(narrow(GFL, backbone=SHALLOW, stacked_convs=1))
    return detector


FAMILIES = [
    (YOLOX, {"depth": 0.33, "width": 0.0625, "depthwise": True}),
    (FCOS, {}),
    (FCOS, {"norm_on_bbox": False, "points": "corner", "score": "root"}),
    (ATSS, {}),
    (DDOD, {}),
    (GFL, {"reg_max": 7}),
    (RetinaNet, {}),
    (RetinaNet, {"anchors": "whole"}),
    (AutoAssign, {}),
]
HEIGHT, WIDTH = 64, 96


def tensors_of(kind: Any, keys: dict[str, Any], pixels: Tensor) -> tuple[Any, dict[str, np.ndarray], Tensor]:
    """A detector, its raw tensors of one image, and the image."""
    made = YOLOX(kind.Config(**keys), ["a", "b"]) if kind is YOLOX else narrow(kind, backbone=SHALLOW, **keys)
    detector = lively(made)
    images = torch.nn.functional.interpolate(pixels[:1].float(), (HEIGHT, WIDTH))
    with torch.no_grad():
        tensors = RawHead(Exportable(detector))(images)
    names = describe_head(detector).tensors()
    return detector, {n: t.numpy() for n, t in zip(names, tensors, strict=True)}, images


def assert_candidates(detector: Any, images: Tensor, boxes: np.ndarray, scores: np.ndarray) -> None:
    with torch.no_grad():
        expected_boxes, expected_scores = detector.candidates(detector(images))
    assert expected_scores.std() > 1e-3
    np.testing.assert_allclose(boxes, expected_boxes[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(scores, expected_scores[0], atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "keys"), FAMILIES, ids=lambda v: v.family if isinstance(v, type) else " ".join(map(str, v.values()))
)
def test_package_and_script_decode_to_the_models_candidates(
    kind: Any,
    keys: dict[str, Any],
    pixels: Tensor,
    script: ModuleType,  # noqa: F811
) -> None:
    detector, outputs, images = tensors_of(kind, keys, pixels)
    head = describe_head(detector)
    boxes, scores = head.locations(outputs, (HEIGHT, WIDTH), len(detector.names), Path("x"))
    assert boxes.dtype == scores.dtype == np.float32
    assert_candidates(detector, images, boxes[0], scores[0])
    model = script.Model.__new__(script.Model)
    model.height, model.width, model.names = HEIGHT, WIDTH, detector.names
    assert_candidates(detector, images, *model.decode(head.model_dump(), outputs))


@pytest.mark.skipif(NODE is None, reason="there is no node")
def test_the_page_decodes_to_the_models_candidates(pixels: Tensor, tmp_path: Path) -> None:
    cases, expected = [], []
    for kind, keys in FAMILIES:
        detector, outputs, images = tensors_of(kind, keys, pixels)
        tensors = {n: {"data": x.ravel().tolist(), "dims": x.shape} for n, x in outputs.items()}
        head = describe_head(detector).model_dump()
        metadata = {"headMaps": head, "names": detector.names, "height": HEIGHT, "width": WIDTH}
        cases.append([tensors, metadata])
        expected.append((detector, images))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "run.mjs").write_text(
        f"""
        import {{ readFileSync }} from "node:fs";
        import {{ decode }} from "{WEB}/head_maps.js";
        const cases = JSON.parse(readFileSync("{tmp_path}/cases.json"));
        const found = cases.map(([tensors, metadata]) => decode(tensors, metadata));
        console.log(JSON.stringify(found.map(({{ boxes, scores }}) => [Array.from(boxes), Array.from(scores)])));
        """
    )
    done = subprocess.run([str(NODE), str(tmp_path / "run.mjs")], capture_output=True, text=True, check=True)
    for (boxes, scores), (detector, images) in zip(json.loads(done.stdout), expected, strict=True):
        rows = np.array(boxes, np.float64).reshape(-1, 4), np.array(scores).reshape(-1, len(detector.names))
        assert_candidates(detector, images, *rows)


def test_tensors_end_with_the_predictors(file: Path, graph: onnx.ModelProto) -> None:
    outputs = {output.name: [d.dim_value for d in output.type.tensor_type.shape.dim] for output in graph.graph.output}
    assert outputs == {
        f"{kind}_{stride}": [1, channels, SIZE // stride, SIZE // stride]
        for stride in (8, 16)
        for kind, channels in (("classes", 3), ("objectness", 1), ("boxes", 4))
    }
    assert {node.op_type for node in graph.graph.node if outputs.keys() & set(node.output)} == {"Conv"}
    assert OnnxPredictor(file, threads=1).session.outputs == list(outputs)


def test_a_file_detects_what_its_model_detects(file: Path, plain: Plain, pixels: Tensor) -> None:
    expected = TorchPredictor(plain, CONF, 0.65, MAX_DET)(pixels)
    assert max(map(len, expected)) > 3
    assert_same(OnnxPredictor(file, threads=1)(pixels), expected)
    report = check_parity(plain, file, pixels.split(1))
    assert report.faults() == []
    assert report.locations > 0


def test_the_gate_tells_another_decoding(file: Path, plain: Plain, pixels: Tensor, tmp_path: Path) -> None:
    head = describe_head(plain).model_copy(update={"offset": 0.0})
    other = with_metadata(file, tmp_path / "other.onnx", head_maps=head.model_dump_json())
    assert check_parity(plain, other, [pixels]).faults() != []


@pytest.mark.slow
def test_a_file_of_any_size_and_shared_towers(gfl: GFL, pixels: Tensor, tmp_path: Path) -> None:
    path = export_onnx(gfl, tmp_path / "x.onnx", ExportOptions(SIZE, conf=0.05, dynamic=True, **RAW))
    wide = torch.nn.functional.interpolate(pixels.float(), (HEIGHT, WIDTH)).to(torch.uint8)
    report = check_parity(gfl, path, [pixels, wide])
    assert report.faults() == []
    assert report.found.detections > 10


def test_the_script_finds_what_the_model_finds(
    file: Path,
    plain: Plain,
    pixels: Tensor,
    script: ModuleType,  # noqa: F811
) -> None:
    expected = TorchPredictor(plain, CONF, 0.65, MAX_DET)(pixels[:1])[0]
    boxes, scores, labels = script.Model(str(file), conf=CONF).predict(pixels[0].permute(1, 2, 0).numpy())
    assert labels.tolist() == expected.labels.tolist()
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(boxes, expected.boxes.clip(0, SIZE), atol=5e-3)


def test_fp16_tensors_are_given_out_in_float32(graph: onnx.ModelProto, file: Path, pixels: Tensor) -> None:
    half = to_half(graph)
    onnx.checker.check_model(half, full_check=True)
    assert [o.name for o in half.graph.output] == [o.name for o in graph.graph.output]
    assert {o.type.tensor_type.elem_type for o in half.graph.output} == {onnx.TensorProto.FLOAT}


def test_int8_gives_each_tensor_one_scale(graph: onnx.ModelProto, pixels: Tensor) -> None:
    images = [image[None].numpy() for image in pixels]
    maker = Int8Quantizer(graph, images, Quantization())
    assert set(maker.layers) == {"stem.0", "down.0", "cls", "obj", "box"}
    assert scales_of_outputs(maker.make()) == {output.name: 1 for output in graph.graph.output}
    costs = layer_costs(maker, images[:1], seconds=0.1)
    assert sum(len(cost.layers) for cost in costs) == len(maker.layers)


@pytest.mark.slow
def test_int8_of_shared_towers(gfl: GFL, pixels: Tensor) -> None:
    """The factor of each level lies between predictor and output; a layer kept in float is so on every level."""
    graph = described_graph(gfl, ExportOptions(SIZE, **RAW))
    maker = Int8Quantizer(graph, [image[None].numpy() for image in pixels], Quantization())
    assert scales_of_outputs(maker.make()) == {output.name: 1 for output in graph.graph.output}
    made = maker.make(["head.gfl_cls"])
    real = {array.name for array in made.graph.initializer if array.data_type == onnx.TensorProto.FLOAT}
    outputs = [n for n in made.graph.node if n.op_type == "Conv" and n.output[0].startswith("classes_")]
    assert len(outputs) == 5
    assert all(node.input[1] in real for node in outputs)


def scales_of_outputs(model: onnx.ModelProto) -> dict[str, int]:
    """How many numbers the scale of each output has, of those that are dequantized at last."""
    arrays = {array.name: onnx.numpy_helper.to_array(array) for array in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    last = [node for node in model.graph.node if outputs & set(node.output) and node.op_type == "DequantizeLinear"]
    return {node.output[0]: arrays[node.input[1]].size for node in last}


@pytest.mark.parametrize("options", [{"raw": True, "nms": True}])
def test_raw_outputs_and_nms_exclude_each_other(options: dict[str, bool], plain: Plain) -> None:
    with pytest.raises(UserError, match="before NMS"):
        ExportOptions(SIZE, **options).check(plain)  # type: ignore[arg-type]


def test_what_is_not_decoded_cell_by_cell_is_refused() -> None:
    with pytest.raises(UserError, match=r"a reppoints has no class and box tensors.*leave --outputs raw out"):
        ExportOptions(SIZE, **RAW).check(narrow(RepPoints, backbone=SHALLOW))


def test_files_that_do_not_hold_their_promise_are_refused(
    file: Path, plain: Plain, pixels: Tensor, tmp_path: Path
) -> None:
    head = describe_head(plain)
    head.levels[0].boxes = "boxes_4"
    absent = with_metadata(file, tmp_path / "absent.onnx", head_maps=head.model_dump_json())
    with pytest.raises(UserError, match=r"has the outputs classes_8, .* promises the raw outputs .*boxes_4"):
        OnnxPredictor(absent)
    head.levels[0].boxes = "boxes_16"
    other = with_metadata(file, tmp_path / "other.onnx", head_maps=head.model_dump_json())
    with pytest.raises(UserError, match=r"other\.onnx: its output boxes_16 has the shape \(1, 4, 4, 4\) where .* 8, 8"):
        OnnxPredictor(other)(pixels[:1])
    odd = with_metadata(file, tmp_path / "odd.onnx", head_maps='{"levels": 3}')
    with pytest.raises(UserError, match="metadata that cannot be right: head_maps"):
        OnnxPredictor(odd)
