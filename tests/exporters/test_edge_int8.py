"""int8 in ncnn, TFLite and ExecuTorch files: the numbers of the model, computed as they say, through the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.engine.scenes import scene
from tests.exporters.conftest import CONF, MAX_DET, SIZE
from tests.exporters.test_edge_formats import FORMATS, nano
from tests.exporters.test_raw_outputs import Plain
from tests.exporters.tflite_file import SIDE, arrays, small_file
from tests.exporters.tiny import TinyDetector
from yoloxkd.config.quantization import Quantization
from yoloxkd.errors import GateError, UserError
from yoloxkd.exporters import EXPORTERS, missing
from yoloxkd.exporters.base import Exportable
from yoloxkd.exporters.coded_form import CodedConv, codable, coded_form
from yoloxkd.exporters.edge_form import edge_form
from yoloxkd.exporters.executorch import _SimulatedFile
from yoloxkd.exporters.layer_steps import LayerSteps, rounded_form, with_weights_of
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.exporters.parity import Int8Recipe
from yoloxkd.exporters.quantized_file import QuantizedFile, steps_of
from yoloxkd.exporters.runtime import OnnxPredictor
from yoloxkd.file_kinds import EXPORTED, parity_note
from yoloxkd.nn.deform import SelfOffsetConv
from yoloxkd.nn.fake_quantization import CODES, fake_quantize, observe, quantized_layers

OPTIONS = ExportOptions(SIZE, nms=False, raw=True, int8=True, conf=CONF, max_det=MAX_DET)
needs_ncnn = pytest.mark.skipif(bool(missing("ncnn")), reason="ncnn or pnnx is not installed")
needs_litert = pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="ai-edge-litert is not installed")


def pictures(pixels: Tensor) -> list[np.ndarray]:
    return [image[None].numpy() for image in pixels]


def trained(model: Any, pixels: Tensor) -> Any:
    fake_quantize(model.eval(), 7)
    observe(model, iter([pixels.float()]))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_calibrated_file_passes_the_gate(kind: str, pixels: Tensor, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = scene(tmp_path / "data", images=4)
    path = tmp_path / f"x{EXPORTED[kind]}"
    recipe = Int8Recipe(pictures(pixels), Quantization(float_layers=["stem"]))
    said: list[str] = []
    EXPORTERS[kind](Plain().eval(), path, OPTIONS, data=data, int8=recipe, say=said.append)
    note = json.loads(parity_note(path).read_text())
    assert note["passed"]
    assert note["float_layers"] == ["stem.0"]
    assert "layers kept in float32" in said[-1]
    predictor = OnnxPredictor(path)
    assert predictor.metadata["precision"] == "int8"
    bad = Quantization(float_layers=["stam"])
    with pytest.raises(UserError, match=r"did you mean 'stem\.0'"):
        EXPORTERS[kind](Plain().eval(), path, OPTIONS, data=data, int8=Int8Recipe(recipe.images, bad))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_trained_for_int8_needs_no_calibration(kind: str, pixels: Tensor, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / f"x{EXPORTED[kind]}"
    model = trained(Plain(), pixels)
    EXPORTERS[kind](model, path, OPTIONS, data=scene(tmp_path / "data", images=4))
    note = json.loads(parity_note(path).read_text())
    assert note["passed"]
    assert note["location_correlation"] > 0.98
    folded = ["stem.0"] if kind == "tflite" else []  # its converter puts the input's scale into these weights
    assert note["float_layers"] == folded


@pytest.mark.slow
@needs_ncnn
def test_ncnn_computes_with_these_numbers(pixels: Tensor, tmp_path: Path) -> None:
    """Inputs rounded symmetrically to 8 bits, weights to theirs, outputs in float32: the file against that in torch."""
    model, path = Plain().eval(), tmp_path / "x.param"
    (tmp_path / "data").mkdir()
    recipe = Int8Recipe(pictures(pixels), Quantization(float_layers=[], reduce_range=False))
    EXPORTERS["ncnn"](model, path, OPTIONS, data=scene(tmp_path / "data", images=4), int8=recipe)
    assert path.read_text().count(" 8=2") == 8  # three predictors on two levels each
    steps, weights = steps_of(model, OPTIONS, recipe.images, recipe.settings)
    assert set(steps) == {"stem.0", "down.0", "cls", "obj", "box"}
    assert steps.keys() < weights.keys()  # "head" does not run
    simulated = Exportable(model)
    for name, one in steps.items():
        conv = simulated.detector.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        factor = 127 / max(one.input[1] * one.input[0], (CODES - one.input[1]) * one.input[0])
        step = torch.from_numpy(one.weight_steps)[:, None, None, None]
        conv.weight.data = torch.from_numpy(one.weight_codes()).float() * step
        conv.register_forward_pre_hook(rounding(factor))
    found = OnnxPredictor(path)
    for image in pixels[:3]:
        with torch.no_grad():
            boxes, scores = simulated(image[None].float())
        got_boxes, got_scores = found.locations(found.run(image[None].numpy()))
        np.testing.assert_allclose(got_scores, scores.numpy(), atol=0.02)
        assert np.mean(np.abs(got_scores - scores.numpy())) < 1e-3
        assert np.mean(np.abs(got_boxes - boxes.numpy())) < 0.05


def rounding(factor: float) -> Callable[[nn.Module, tuple[Tensor]], Tensor]:
    return lambda _, inputs: (inputs[0] * factor).round().clamp(-127, 127) / factor


@needs_litert
def test_tflite_computes_with_these_numbers() -> None:
    """Every convolution between 8-bit codes: at most a code apart from the same in torch, hardly anywhere."""
    from yoloxkd.exporters.tflite_graph import TfliteGraph
    from yoloxkd.exporters.tflite_int8 import with_int8

    values, content = arrays(), small_file()
    names = {
        "first": ((0.05, 100), (0.2, 128)),
        "depthwise": ((0.2, 128), (0.06, 120)),
        "last": ((6 / CODES, 0), (0.1, 128)),
    }
    steps = {
        name: LayerSteps(values[name], np.abs(values[name]).reshape(len(values[name]), -1).max(1) / 127, *around)
        for name, around in names.items()
    }
    x = np.random.default_rng(1).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    y = torch.from_numpy(x)
    for name, padding, groups in (("first", 1, 1), ("depthwise", 1, 6), ("last", 0, 1)):
        one = steps[name]
        weight = torch.from_numpy(one.weight_codes()).float() * torch.from_numpy(one.weight_steps)[:, None, None, None]
        y = F.conv2d(rounded(y, *one.input), weight, torch.from_numpy(values[f"{name}_bias"]), 1, padding, 1, groups)
        y = rounded(y.clamp(0, 6), 6 / CODES, 0) if name == "depthwise" else rounded(y, *one.output)
    file, found = with_int8(content, steps)
    assert found == set(steps)
    kinds = [graph.kind(operator) for graph in [TfliteGraph(file)] for operator in graph.operators]
    operators = TfliteGraph(file).kinds
    assert kinds[kinds.index(operators.PAD) + 1] == operators.DEPTHWISE_CONV_2D  # rounded before it is padded
    made = run(file, x)
    codes = np.abs(made - y.numpy()) / 0.1
    assert codes.max() < 1.01
    assert np.mean(codes > 0.01) < 0.02
    assert np.abs(made - run(content, x)).max() > 0.01  # the float32 file is another
    changed = {**steps, "first": replace(steps["first"], weights=steps["first"].weights * 2)}
    assert with_int8(content, changed)[1] == {"depthwise", "last"}


@needs_litert
def test_float_weights_leave_the_file() -> None:
    from yoloxkd.exporters.tflite_int8 import with_int8

    weights = arrays()["first"]
    steps = {
        "first": LayerSteps(weights, np.abs(weights).reshape(len(weights), -1).max(1) / 127, (0.1, 128), (0.1, 128))
    }
    made, _ = with_int8(small_file(), steps)
    assert weights.transpose(0, 2, 3, 1).tobytes() in small_file()
    assert weights.transpose(0, 2, 3, 1).tobytes() not in made
    assert steps["first"].weight_codes().transpose(0, 2, 3, 1).tobytes() in made


@needs_litert
def test_fp16_weights_of_a_tflite_file() -> None:
    from yoloxkd.exporters.tflite_half import with_half_weights

    made = with_half_weights(small_file())
    for name in ("first", "depthwise", "last"):
        stored = arrays()[name].transpose((1, 2, 3, 0) if name == "depthwise" else (0, 2, 3, 1))
        assert stored.astype(np.float16).tobytes() in made
        assert np.ascontiguousarray(stored).tobytes() not in made
    x = np.random.default_rng(1).normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)
    values = {name: array.astype(np.float16).astype(np.float32) for name, array in arrays().items()}
    y = F.conv2d(torch.from_numpy(x), torch.from_numpy(values["first"]), torch.from_numpy(arrays()["first_bias"]), 1, 1)
    y = F.conv2d(y, torch.from_numpy(values["depthwise"]), torch.from_numpy(arrays()["depthwise_bias"]), 1, 1, 1, 6)
    y = F.conv2d(y.clamp(0, 6), torch.from_numpy(values["last"]), torch.from_numpy(arrays()["last_bias"]))
    np.testing.assert_allclose(run(made, x), y.numpy(), atol=1e-4)
    assert np.abs(run(small_file(), x) - y.numpy()).max() > 1e-4


def run(file: bytes, x: np.ndarray) -> np.ndarray:
    """What LiteRT makes of (1, 3, H, W) float32, in the same layout."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=file)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.transpose(0, 2, 3, 1))
    interpreter.invoke()
    made: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return made.transpose(0, 3, 1, 2)


def rounded(x: Tensor, step: float, zero: int) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, step, zero, 0, CODES)


@pytest.mark.skipif(bool(missing("executorch")), reason="executorch is not installed")
@pytest.mark.slow
def test_executorch_computes_with_these_numbers(pixels: Tensor, tmp_path: Path) -> None:
    """Every convolution between 8-bit codes: as the same in torch."""
    model, path = Plain().eval(), tmp_path / "x.pte"
    (tmp_path / "data").mkdir()
    recipe = Int8Recipe(pictures(pixels), Quantization(float_layers=[], reduce_range=False))
    EXPORTERS["executorch"](model, path, OPTIONS, data=scene(tmp_path / "data", images=4), int8=recipe)
    steps, _ = steps_of(model, OPTIONS, recipe.images, recipe.settings)
    coded = Exportable(model)
    coded_form(edge_form(coded.detector), steps)
    found, plain = OnnxPredictor(path, threads=1), Exportable(model)
    for image in pixels[:3]:
        with torch.no_grad():
            _, scores = coded(image[None].float())
            _, unrounded = plain(image[None].float())
        got = found.locations(found.run(image[None].numpy()))[1]
        assert np.mean(np.abs(got - scores.numpy()) > 1e-5) < 0.02
        assert np.mean(np.abs(got - unrounded.numpy()) > 1e-5) > 0.5


def test_the_coded_form_is_the_model_trained_for_int8(pixels: Tensor) -> None:
    model = trained(nano(), pixels)
    coded = Exportable(model)
    steps = rounded_form(coded.detector)
    coded_form(coded.detector, with_weights_of(edge_form(coded.detector), steps))
    with torch.no_grad():
        got, expected = coded(pixels.float()), Exportable(model)(pixels.float())
    for a, b in zip(got, expected, strict=True):
        assert float(((a - b).abs() > 1e-4 * b.abs().max()).float().mean()) < 0.02


def test_layers_are_ranked_by_what_the_file_computes(pixels: Tensor) -> None:
    model = Plain().eval()
    images = pictures(pixels)[:2]
    steps, _ = steps_of(model, OPTIONS, images, Quantization())
    file = _SimulatedFile(model, steps, lambda path, chosen: set(chosen))
    with torch.no_grad():
        plain = Exportable(model)(torch.from_numpy(images[0]).float())
    of_float, of_all, of_some = (file.outputs(names, images)[0] for names in (None, [], ["stem.0", "down.0"]))
    np.testing.assert_allclose(of_float[1], plain[1][0].numpy(), atol=1e-6)
    apart = [float(np.abs(one[1] - of_float[1]).mean()) for one in (of_some, of_all)]
    assert 0 < apart[0] < apart[1]
    assert of_all[0].shape == (*plain[1].shape[1:2], 4)


def test_the_rounded_form_has_the_weights_of_the_model(pixels: Tensor) -> None:
    model = trained(nano(), pixels)
    plain = Exportable(model)
    steps = rounded_form(plain.detector)
    assert not quantized_layers(plain.detector)
    steps = with_weights_of(edge_form(plain.detector), steps)
    assert steps["backbone.backbone.stem.conv.conv"].weights.shape[2:] == (6, 6)
    for one in steps.values():
        back = one.weight_codes() * one.weight_steps[:, None, None, None]
        np.testing.assert_allclose(back, one.weights, atol=1e-6 * np.abs(one.weights).max())
        assert np.abs(one.weight_codes()).max() <= 63
    with torch.no_grad():  # the activations are not rounded, so that it is near the model and no more
        apart = (plain(pixels.float())[0] - Exportable(model)(pixels.float())[0]).abs()
    assert 0 < float(apart.mean()) < 0.5


def test_a_deformable_convolution_that_is_trained_for_int8_is_of_onnx_alone(pixels: Tensor) -> None:
    model = Plain()
    model.down[0] = SelfOffsetConv(16, 16, 3, 2, bias=False)
    edge = Exportable(trained(model, pixels))
    with pytest.raises(UserError, match=r"deformable convolution down\.0 is trained for int8, which only ONNX"):
        rounded_form(edge.detector)


@pytest.mark.slow
@needs_ncnn
def test_an_int8_file_that_differs_is_not_published(
    pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = LayerSteps.weight_codes
    monkeypatch.setattr(LayerSteps, "weight_codes", lambda self: -honest(self))
    (tmp_path / "data").mkdir()
    recipe = Int8Recipe(pictures(pixels), Quantization(seconds=1))
    with pytest.raises(GateError, match=r"x\.param was not written"):
        EXPORTERS["ncnn"](
            Plain().eval(), tmp_path / "x.param", OPTIONS, data=scene(tmp_path / "data", images=2), int8=recipe
        )
    assert {file.name for file in tmp_path.iterdir()} == {"data"}


@pytest.mark.parametrize("kind", ["ncnn", "tflite", "executorch"])
def test_what_makes_no_file_is_said_before_the_conversion(
    kind: str, pixels: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = {"ncnn": "_float_files", "tflite": "_float_file", "executorch": "_lowered"}[kind]
    monkeypatch.setattr(f"yoloxkd.exporters.{kind}.{convert}", None)
    export, path, data = EXPORTERS[kind], tmp_path / f"x{EXPORTED[kind]}", scene(tmp_path, images=1)
    with pytest.raises(UserError, match="half and int8 exclude each other"):
        export(Plain().eval(), path, replace(OPTIONS, half=True), data=data)
    recipe = Int8Recipe(pictures(pixels), Quantization(float_layers=["stam"]))
    with pytest.raises(UserError, match=r"did you mean 'stem\.0'"):
        export(Plain().eval(), path, OPTIONS, data=data, int8=recipe)


def test_a_layer_that_the_converter_changed_is_left_in_float(tmp_path: Path) -> None:
    """A search tries layers alone; one that is not found there says nothing of the others."""
    asked: list[set[str]] = []

    def write(path: Path, steps: Mapping[str, LayerSteps]) -> set[str]:
        asked.append(set(steps))
        return set(steps) - {"stem"}

    step = LayerSteps(np.ones((1, 1, 1, 1), np.float32), np.ones(1, np.float32), (1.0, 0), (1.0, 0))
    file = QuantizedFile(dict.fromkeys(("stem", "head"), step), ".tflite", write)
    file.write(tmp_path / "x.tflite", ["head"])
    file.write(tmp_path / "x.tflite")
    assert asked == [{"stem"}, {"stem", "head"}]
    assert file.lost == {"stem"}
    nothing = QuantizedFile({"stem": step}, ".tflite", write)
    with pytest.raises(UserError, match="changed every convolution"):
        nothing.write(tmp_path / "x.tflite")


def test_a_deformable_convolution_stands_between_no_codes() -> None:
    detector = TinyDetector(["red", "blue"]).eval()
    detector.down[0] = SelfOffsetConv(16, 16, 3, 2, bias=False)
    names = ["stem.0", "down.0.conv_offset", "down.0"]
    assert codable(detector, names) == names[:2]
    weights = {name: detector.get_submodule(name).get_parameter("weight").detach().numpy() for name in names}
    steps = {
        name: LayerSteps(one, np.full(len(one), 0.1, np.float32), (0.1, 0), (0.1, 0)) for name, one in weights.items()
    }
    coded_form(detector, steps)
    assert [type(detector.get_submodule(name)) for name in names] == [CodedConv, CodedConv, SelfOffsetConv]
    with torch.no_grad():
        assert detector(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).boxes.isfinite().all()
