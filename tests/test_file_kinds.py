"""ONNX files and checkpoints are known by their content."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from yoloxkd.file_kinds import is_onnx, is_own_onnx, is_torch


def test_an_onnx_file_is_known_whatever_its_name(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 64, 64]) for name in ("images", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["images"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    bare, own = tmp_path / "bare", tmp_path / "own"
    onnx.save(model, str(bare))
    helper.set_model_props(model, {"size_multiple": "32"})
    onnx.save(model, str(own))
    assert is_onnx(bare)
    assert is_onnx(own)
    assert not is_own_onnx(bare)
    assert is_own_onnx(own)
    (tmp_path / "cut").write_bytes(own.read_bytes()[: len(own.read_bytes()) // 2])
    assert is_onnx(tmp_path / "cut")


def test_other_files_are_not(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx"
    for legacy in (False, True):
        torch.save({"model": torch.zeros(3)}, file, _use_new_zipfile_serialization=not legacy)
        assert is_torch(file)
        assert not is_onnx(file)
    for content in (b"", b"text", b"\x08", b"\x08\x09:\x04", bytes(range(256)), b"\xff" * 99):
        file.write_bytes(content)
        assert not is_torch(file)
        assert not is_own_onnx(file)
    assert not is_onnx(tmp_path / "absent")
    assert not is_onnx(tmp_path)
