"""int8 export: what is quantized, how the layers that suffer are found, and what the gate refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from tests.conftest import write_toy
from tests.engine.scenes import scene
from tests.exporters.tiny import TinyDetector
from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.calibration import calibration_images
from yoloxkd.exporters.int8 import Int8Quantizer
from yoloxkd.exporters.int8_search import named_layers, search_int8
from yoloxkd.exporters.onnx import ExportOptions, described_graph
from yoloxkd.exporters.operators import NETWORK, QUANTIZATION, SUPPRESSION, operators
from yoloxkd.exporters.parity import Int8Recipe, export_checked
from yoloxkd.exporters.parity_report import INT8, ParityReport
from yoloxkd.exporters.sensitivity import describe_costs, layer_costs
from yoloxkd.nn.deform import SelfOffsetConv


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    data = scene(tmp_path_factory.mktemp("calibration"), images=6)
    return calibration_images(str(Path(data.paths[0]).parent), 64, (114, 114, 114), 6)


@pytest.fixture(scope="module")
def graph(detector: TinyDetector) -> onnx.ModelProto:
    return described_graph(detector, ExportOptions(64, int8=True))


@pytest.fixture(scope="module")
def maker(graph: onnx.ModelProto, pictures: list[np.ndarray]) -> Int8Quantizer:
    return Int8Quantizer(graph, pictures, Quantization())


def kinds_of_weights(model: onnx.ModelProto) -> dict[str, set[int]]:
    """Layer -> element types of the arrays that hold its weights."""
    kinds: dict[str, set[int]] = {}
    for array in model.graph.initializer:
        for layer in ("stem.0", "down.0", "head"):
            if array.name.startswith(f"network.detector.{layer}.weight") and len(array.dims) == 4:
                kinds.setdefault(layer, set()).add(array.data_type)
    return kinds


def test_convolutions_are_int8_per_channel_and_the_predictors_float(maker: Int8Quantizer) -> None:
    model = maker.make()
    int8, real = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
    assert maker.layers == ["stem.0", "down.0"]
    assert kinds_of_weights(model) == {"stem.0": {int8}, "down.0": {int8}, "head": {real}}
    arrays = {a.name: numpy_helper.to_array(a) for a in model.graph.initializer}
    scales = [a for name, a in arrays.items() if name.startswith("network.detector.stem.0.weight") and "scale" in name]
    assert [s.shape for s in scales] == [(16,)]
    assert len(np.unique(scales[0])) > 1
    weights = next(a for n, a in arrays.items() if "stem.0.weight" in n and a.dtype == np.int8 and a.ndim == 4)
    assert np.abs(weights).max() == 64  # 7 bits
    assert operators(model) - {"Tanh"} <= NETWORK | SUPPRESSION | QUANTIZATION  # Tanh: the tiny detector's own
    assert {p.key for p in model.metadata_props} >= {"names", "precision"}
    assert not [p.key for p in model.metadata_props if p.key.startswith("onnx.")]


def test_a_layer_kept_in_float_is_not_touched(maker: Int8Quantizer) -> None:
    kinds = kinds_of_weights(maker.make(["stem.0"]))
    assert kinds["stem.0"] == {onnx.TensorProto.FLOAT}
    assert kinds["down.0"] == {onnx.TensorProto.INT8}


@pytest.mark.slow
def test_a_deformable_convolution_has_the_name_of_its_layer(pictures: list[np.ndarray], pixels: Tensor) -> None:
    detector = TinyDetector(["red", "blue"]).eval()
    detector.down[0] = SelfOffsetConv(16, 16, 3, 2, bias=False)
    torch.nn.init.normal_(detector.down[0].conv_offset.weight, std=0.1)
    with torch.no_grad():
        torch.testing.assert_close(
            Exportable(detector)(pixels.float())[0], detector(pixels).boxes, atol=1e-3, rtol=1e-5
        )
    graph = described_graph(detector, ExportOptions(64, nms=False, int8=True))
    maker = Int8Quantizer(graph, pictures[:2], Quantization())
    assert maker.layers == ["stem.0", "down.0.conv_offset", "down.0"]
    arrays = {a.name: a.data_type for a in maker.make(["down.0.conv_offset"]).graph.initializer}
    kinds = {name: kind for name, kind in arrays.items() if "down.0.weight" in name and "scale" not in name}
    assert onnx.TensorProto.INT8 in kinds.values()


def test_ranges_that_only_a_silu_reads_start_at_the_floor(graph: onnx.ModelProto, pictures: list[np.ndarray]) -> None:
    def lowest(settings: Quantization) -> float:
        """The smallest value that the int8 output of the first convolution can take."""
        model = Int8Quantizer(graph, pictures, settings).make()
        arrays = {a.name: numpy_helper.to_array(a) for a in model.graph.initializer}
        conv = next(n for n in model.graph.node if n.op_type == "Conv")
        after = next(n for n in model.graph.node if conv.output[0] in n.input)
        assert after.op_type == "QuantizeLinear"
        return float((0 - int(arrays[after.input[2]])) * arrays[after.input[1]])

    assert lowest(Quantization(silu_floor=-1)) == pytest.approx(-1, abs=0.1)
    assert lowest(Quantization(silu_floor=None)) < -1.5


def test_the_report_finds_the_layer_that_suffers(pictures: list[np.ndarray]) -> None:
    """One channel of the stem that nobody reads is so large that int8 has no steps left for the others."""
    detector = TinyDetector(["red", "blue"]).eval()
    detector.stem[1].weight.data[0] *= 1000  # type: ignore[index, union-attr]
    detector.down[0].weight.data[:, 0] = 0  # type: ignore[index, union-attr]
    detector.head.weight.data[:, 0] = 0
    graph = described_graph(detector, ExportOptions(64, nms=False, int8=True))
    maker = Int8Quantizer(graph, pictures, Quantization())
    costs = layer_costs(maker, pictures, seconds=60)
    assert [c.layers for c in costs] == [("stem.0",), ("down.0",)]
    assert costs[0].total > 2 * costs[1].total
    text = describe_costs(costs, ["stem.0"]).splitlines()
    assert [line.split()[0] for line in text] == ["layer", "stem.0", "down.0"]
    assert [line.split()[-1] for line in text[1:]] == ["float32", "int8"]
    groups = layer_costs(maker, pictures, seconds=1e-9)
    assert {layer for cost in groups for layer in cost.layers} == {"stem.0", "down.0"}


def test_more_layers_stay_float_until_the_file_passes(maker: Int8Quantizer, pictures: list[np.ndarray]) -> None:
    aps = iter([0.1, 0.295])
    judged: list[list[str]] = []

    def judge(in_float: list[str]) -> ParityReport:
        judged.append(in_float)
        return ParityReport(INT8, images=1, model_ap=0.3, file_ap=next(aps))

    said: list[str] = []
    report = search_int8(maker, pictures, Quantization(), judge, said.append)
    assert [len(in_float) for in_float in judged] == [0, 1]
    assert report.faults() == []
    assert len(report.float_layers or []) == 1
    assert said == []
    judged.clear()
    report = search_int8(
        maker,
        pictures,
        Quantization(float_layers=["down"], sensitivity=True),
        lambda in_float: judged.append(in_float) or ParityReport(INT8, images=1, model_ap=0.3, file_ap=0.1),
        said.append,
    )
    assert judged == [["down.0"]]  # what the user chose is not changed
    assert report.float_layers == ["down.0"]
    assert "score error" in said[0]


def test_names_of_layers() -> None:
    layers = ["backbone.stem.conv", "backbone.dark2.conv", "head.stem"]
    assert named_layers(layers, ["backbone"]) == layers[:2]
    assert named_layers(layers, []) == []
    with pytest.raises(UserError, match=r"begins with 'backbone.stam'; did you mean 'backbone.stem.conv'"):
        named_layers(layers, ["backbone.stam"])


@pytest.mark.slow
def test_an_int8_file_and_its_note(tmp_path: Path, detector: TinyDetector, pictures: list[np.ndarray]) -> None:
    data = scene(tmp_path)
    options = ExportOptions(64, int8=True)
    said: list[str] = []
    path = export_checked(
        detector, tmp_path / "x.onnx", options, data=data, int8=Int8Recipe(pictures, Quantization()), say=said.append
    )
    note = json.loads((tmp_path / "x.parity.json").read_text())
    assert note["passed"]
    assert abs(note["file_ap"] - note["model_ap"]) <= 0.01
    assert note["location_correlation"] > 0.9
    assert note["quantization"]["reduce_range"] is True
    model = onnx.load(str(path))
    assert [o.name for o in model.graph.output] == ["boxes", "scores", "labels", "counts"]
    assert {p.key: p.value for p in model.metadata_props}["precision"] == "int8"
    assert "AP of the file" in said[-1]


def test_a_broken_int8_file_is_refused(
    tmp_path: Path, detector: TinyDetector, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Int8Quantizer.make

    def broken(self: Int8Quantizer, in_float: object = ()) -> onnx.ModelProto:
        model = honest(self, in_float)  # type: ignore[arg-type]
        weight = next(i for i in model.graph.initializer if i.name.endswith("head.weight"))
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        return model

    monkeypatch.setattr(Int8Quantizer, "make", broken)
    recipe = Int8Recipe(pictures, Quantization(float_layers=[]))
    folder = tmp_path / "out"
    with pytest.raises(GateError, match="was not written"):
        export_checked(detector, folder / "x.onnx", ExportOptions(64, int8=True), data=scene(tmp_path), int8=recipe)
    assert list(folder.iterdir()) == []


def test_int8_without_objects_to_judge_it_on(
    tmp_path: Path, detector: TinyDetector, pictures: list[np.ndarray]
) -> None:
    data = scene(tmp_path, names=("green",))
    data.names = ["unknown"]
    recipe = Int8Recipe(pictures, Quantization())
    with pytest.raises(UserError, match="give --verify DATA"):
        export_checked(detector, tmp_path / "x.onnx", ExportOptions(64, int8=True), data=data, int8=recipe)


def test_calibration_images_of_a_data_set_and_of_a_folder(tmp_path: Path) -> None:
    yaml = write_toy(tmp_path / "toy", images=7)
    of_set = calibration_images(str(yaml), 64, (1, 2, 3), 100)
    of_folder = calibration_images(str(tmp_path / "toy" / "images" / "train"), 64, (1, 2, 3), 100)
    assert len(of_set) == 7
    assert {p.tobytes() for p in of_set} == {p.tobytes() for p in of_folder}
    assert (of_set[0].shape, of_set[0].dtype) == ((1, 3, 64, 64), np.uint8)
    assert len(calibration_images(str(yaml), 64, (1, 2, 3), 3)) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--calib .*empty holds no image"):
        calibration_images(str(tmp_path / "empty"), 64, (1, 2, 3), 3)


def test_half_and_int8_exclude_each_other(detector: TinyDetector) -> None:
    with pytest.raises(UserError, match="choose one"):
        described_graph(detector, ExportOptions(64, half=True, int8=True))


def test_levels_that_share_a_convolution_and_have_factors_of_their_own(pictures: list[np.ndarray]) -> None:
    """Folded into the weights, the factors would make a layer of each level, under a name that no module bears."""
    name = "network.detector.head.conv_reg.weight"
    weights = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    arrays = [numpy_helper.from_array(weights, name)]
    nodes, outputs = [], []
    for level, factor in enumerate((1.0, 1.3, 0.7)):
        arrays.append(numpy_helper.from_array(np.array(factor, np.float32), f"factor{level}"))
        strides = [2 << level] * 2
        nodes.append(helper.make_node("Conv", ["images", name], [f"conv{level}"], f"conv{level}", strides=strides))
        nodes.append(helper.make_node("Mul", [f"conv{level}", f"factor{level}"], [f"box{level}"], f"mul{level}"))
        outputs.append(helper.make_tensor_value_info(f"box{level}", onnx.TensorProto.FLOAT, [1, 4, None, None]))
    size = [1, 3, *pictures[0].shape[2:]]
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, size)
    graph = helper.make_graph(nodes, "raw", [images], outputs, arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {"head_maps": "3 levels"})
    maker = Int8Quantizer(model, pictures[:2], Quantization())
    assert maker.layers == ["head.conv_reg"]
    in_float = maker.make(["head.conv_reg"])
    assert {a.data_type for a in in_float.graph.initializer if a.name == name} == {onnx.TensorProto.FLOAT}
    lowest, highest = maker.ranges()["head.conv_reg"][1]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    first = [session.run(["box0"], {"images": picture.astype(np.float32)})[0] for picture in pictures[:2]]
    assert lowest <= min(float(one.min()) for one in first) + 1e-3
    assert highest >= max(float(one.max()) for one in first) - 1e-3
