"""Wrong exports and wrong exported files: one sentence, its exit status, and no file."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.cli.test_mistakes import refused
from yoloxkd.cli import run
from yoloxkd.errors import UserError
from yoloxkd.exporters import NEEDED, check_format, missing


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "coreml"], ["unknown export format 'coreml'", "formats: onnx (installed)", "openvino ("]),
        (["--format", "ncnn", "--output", "x.onnx"], ["lacks ncnn, pnnx" if missing("ncnn") else "ends in .param"]),
        (["--opset", "16"], ["opset 16", "17 to 23"]),
        (["--outputs", "boxes"], ["unknown outputs 'boxes'", "raw"]),
        (["--outputs", "detection"], ["did you mean 'detections'?"]),
        (["--outputs", "detections", "--no-nms"], ["--outputs detections", "--no-nms"]),
        (["--outputs", "raw", "--nms"], ["--outputs raw", "--nms puts it in"]),
        (["--outputs", "locations", "--nms"], ["--outputs locations", "--nms puts it in"]),
        (["--int8"], ["--int8 needs --calib"]),
        (["--int8", "--calib", "EMPTY"], ["--calib", "EMPTY", "no image"]),
        (["--int8", "--calib", "nowhere"], ["unknown data set 'nowhere'"]),
        (["--int8", "--half", "--calib", "TOY"], ["choose one"]),
        (["--calib", "TOY"], ["calib", "add --int8"]),
        (["--set", "export.sensitivity=true"], ["sensitivity", "add --int8"]),
        (["--int8", "--calib", "TOY", "--set", "export.methd=minmax"], ["did you mean 'export.method'"]),
        (["--int8", "--calib", "TOY", "--set", "export.method=magic"], ["export.method", "minmax"]),
        (["--int8", "--calib", "TOY", "--set", "export.float_layers=[bakbone]"], ["no layer's name begins with"]),
        (["--imgsz", "100"], ["100", "multiple", "96"]),
        (["--output", "in-the-way/x.onnx"], ["in-the-way/x.onnx"]),
        (["--output", "/proc/x.onnx"], ["could not write /proc/x.onnx"]),
        (["--output", "EMPTY"], ["is a folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_exports_that_cannot_be(
    options: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    toy: Path,
    toy_run: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    Path("in-the-way").write_text("a file")
    given = [str(toy) if o == "TOY" else o for o in options]
    arguments = ["export", str(toy_run / "best.pt"), "--verify", str(toy), "--output", "x.onnx", *given]
    refused(capsys, arguments, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["EMPTY", "in-the-way"]


def test_an_onnx_file_that_is_not_ours(capsys: pytest.CaptureFixture[str], tmp_path: Path, toy: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 64, 64]) for name in ("images", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "bare.onnx"))
    refused(capsys, ["val", tmp_path / "bare.onnx", "--data", toy], "bare.onnx", "lacks the metadata names")
    helper.set_model_props(model, {"names": json.dumps(["red"]), "nms": "true"})
    onnx.save(model, str(tmp_path / "some.onnx"))
    text = refused(capsys, ["val", tmp_path / "some.onnx", "--data", toy], "size_multiple, input_size")
    assert "names" not in text
    (tmp_path / "text.onnx").write_text("not a graph")
    picture = toy.parent / "images" / "val" / "0.png"
    refused(capsys, ["predict", tmp_path / "text.onnx", picture], "text.onnx", "not an ONNX file")


def test_the_list_of_formats_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NEEDED, "ncnn", (("no_such_module",), "pip install 'yoloxkd[ncnn]'"))
    assert run(["export", "--format", "list"]) == 0
    shown = capsys.readouterr().out
    assert "onnx (installed)" in shown
    assert "ncnn (not installed: pip install 'yoloxkd[ncnn]')" in shown


def test_an_export_is_not_exported_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("not a graph")
    refused(capsys, ["export", tmp_path / "x.onnx"], "x.onnx")


def test_a_format_that_lacks_a_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDED, "onnx", (("no_such_module",), "pip install it"))
    words = r"'onnx' lacks no_such_module; formats: onnx \(not installed: pip install it\), .* onnxruntime \(installed"
    with pytest.raises(UserError, match=words):
        check_format("onnx")
