"""int8 files of a model trained for int8: its own scales, equal layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.engine.scenes import scene
from tests.engine.test_step import batch as objects
from tests.exporters.tiny import TinyDetector
from tests.losses import means
from tests.nn.fpn import BACKBONE
from yoloxkd.assembly.models import build_detector
from yoloxkd.config.recipe import OptimSection
from yoloxkd.engine.callbacks.activation_ranges import ActivationRanges
from yoloxkd.engine.optim import optimizer
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters.onnx import ExportOptions, described_graph
from yoloxkd.exporters.operators import NETWORK, QUANTIZATION, operators
from yoloxkd.exporters.parity import export_checked
from yoloxkd.exporters.trained_int8 import layer_differences, layer_faults
from yoloxkd.nn.deform import SelfOffsetConv
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import fake_quantize, observe, quantized_layers
from yoloxkd.types import Draw

RAW = ExportOptions(64, nms=False, int8=True)


def quantized(detector: Detector, images: Tensor) -> Detector:  # type: ignore[type-arg]
    fake_quantize(detector.eval(), 7)  # with 8 bits a CPU without VNNI overflows, and is found out
    observe(detector, iter([images.float()]))
    return detector


@pytest.fixture
def trained(pixels: Tensor) -> TinyDetector:
    detector = TinyDetector(["red", "blue", "green"])
    quantized(detector, pixels)
    return detector


def test_the_graph_has_exactly_the_model_s_scales(trained: TinyDetector, pixels: Tensor) -> None:
    graph = described_graph(trained, RAW)
    onnx.checker.check_model(graph, full_check=True)
    assert operators(graph) - {"Tanh"} <= NETWORK | QUANTIZATION
    arrays = {a.name: numpy_helper.to_array(a) for a in graph.graph.initializer}
    made_by = {name: node for node in graph.graph.node for name in node.output}
    layers = quantized_layers(trained)
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 4  # both levels have the same predictor
    for node in convolutions:
        weight = made_by[node.input[1]]
        layer = layers[weight.input[0].removesuffix(".weight").rpartition("detector.")[2]]
        folded, bias = layer.folded()
        np.testing.assert_array_equal(arrays[weight.input[1]], layer.scale_of(folded, bias).numpy(force=True))
        assert arrays[weight.input[0]].dtype == np.int8
        before, after = (
            made_by[made_by[node.input[0]].input[0]],
            next(n for n in graph.graph.node if node.output[0] in n.input),
        )
        for read, quantizer in ((before, layer.input), (after, layer.output)):
            scale, zero = quantizer.codes()
            assert read.op_type == "QuantizeLinear"
            assert (arrays[read.input[1]], arrays[read.input[2]]) == (scale.numpy(), zero.numpy())
            assert arrays[read.input[2]].dtype == np.uint8
    differences = layer_differences(graph, trained, pixels[:1].numpy())
    assert [d.layer for d in differences] == ["stem.0", "down.0", "head", "head"]
    assert layer_faults(differences) == []


def test_a_wrong_scale_is_found(trained: TinyDetector, pixels: Tensor) -> None:
    graph = described_graph(trained, RAW)
    scale = next(a for a in graph.graph.initializer if a.name.endswith("down.0.weight_scale"))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.05), scale.name))
    faults = layer_faults(layer_differences(graph, trained, pixels[:1].numpy()))
    assert len(faults) == 1
    assert "1 of 4 int8 convolutions differ from the model's; the worst, down.0" in faults[0]


@pytest.mark.slow
def test_the_gate_needs_no_calibration(tmp_path: Path, trained: TinyDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scene(tmp_path)
    said: list[str] = []
    path = export_checked(trained, tmp_path / "x.onnx", ExportOptions(64, int8=True), data=data, say=said.append)
    note = json.loads((tmp_path / "x.parity.json").read_text())
    assert note["passed"]
    assert abs(note["file_ap"] - note["model_ap"]) <= 0.01
    assert {p.key: p.value for p in onnx.load(str(path)).metadata_props}["precision"] == "int8"
    monkeypatch.setattr("yoloxkd.exporters.trained_int8.SHARE", -1.0)
    with pytest.raises(GateError, match=r"4 of 4 int8 convolutions differ"):
        export_checked(trained, tmp_path / "y.onnx", ExportOptions(64, int8=True), data=data)
    assert not (tmp_path / "y.onnx").exists()


def test_float32_and_fp16_files_are_another_model(trained: TinyDetector) -> None:
    for options in (ExportOptions(64), ExportOptions(64, half=True)):
        with pytest.raises(UserError, match=r"trained for int8.*give --int8"):
            described_graph(trained, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcos-mobilenetv2", "gfl-mobilenetv2", "deformable"])
def test_every_layer_is_the_model_s(name: str, pixels: Tensor) -> None:
    """ONNX Runtime computes in integers what the model rounds: at most one step apart, in under 0.5 % of the codes."""
    torch.manual_seed(0)
    tiny = {"backbone": BACKBONE, "backbone_weights": "none", "channels": 16, "stacked_convs": 1, "groups": 4}
    if name == "deformable":
        detector: Detector = TinyDetector(["red", "blue"])  # type: ignore[type-arg]
        detector.down[0] = SelfOffsetConv(16, 16, 3, 2, bias=False)  # type: ignore[index, operator]
        nn.init.normal_(detector.down[0].conv_offset.weight, std=0.1)  # type: ignore[index, union-attr]
    else:
        detector = build_detector({"name": name} | tiny, ["red", "blue"])
        detector.train()
        with torch.no_grad():
            for _ in range(20):  # statistics of the norms, so that maps do not vanish
                detector(pixels.float())
    quantized(detector, pixels)
    if name != "deformable":
        train_one_step(detector)
    graph = described_graph(detector, RAW)
    differences = layer_differences(graph, detector, pixels[:1].numpy())
    assert {d.layer for d in differences} == set(quantized_layers(detector))
    assert layer_faults(differences) == []


def train_one_step(detector: Detector) -> None:  # type: ignore[type-arg]
    """A step in which every convolution learns."""
    before = {name: parameter.clone() for name, parameter in detector.named_parameters()}
    state = SimpleNamespace(detector=detector, iteration=0, epochs=1, iters_per_epoch=1)
    ranges = ActivationRanges(momentum=0.02, freeze=0.7)
    ranges.on_fit_start(state)  # type: ignore[arg-type]
    batch = objects()
    out = detector.train()(batch.images)
    losses = detector.losses(out, batch.targets, detector.assign(out, batch.targets, Draw(0, 0)))
    torch.stack(list(means(losses).values())).sum().backward()
    optimizer([detector], 1e-3, OptimSection(kind="adam")).step()
    ranges.on_step(state)  # type: ignore[arg-type]
    moved = {name for name, parameter in detector.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert {f"{name}.weight" for name in quantized_layers(detector)} & trained <= moved
    detector.eval()
