"""A value has one default: Python users and the command line get the same numbers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import typer

from yoloxkd.api import Detector
from yoloxkd.cli import app
from yoloxkd.config.files import cfg_folder, cfg_names
from yoloxkd.config.load import read_yaml
from yoloxkd.config.recipe import ValSection
from yoloxkd.engine.evaluate import TorchPredictor
from yoloxkd.exporters.onnx import ExportOptions
from yoloxkd.nn import DETECTORS
from yoloxkd.ops.nms import NMS


def defaults(function: Any) -> Mapping[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


@pytest.mark.parametrize("key", ["conf", "iou", "max_det"])
def test_nms_is_the_same_in_training_measuring_and_exporting(key: str) -> None:
    typed = getattr(ValSection(), key)
    assert getattr(NMS(), key) == defaults(TorchPredictor)[key] == getattr(ExportOptions(64), key) == typed


@pytest.mark.parametrize("option", ["conf", "iou", "imgsz"])
def test_predict_is_the_same_in_python_and_on_the_command_line(option: str) -> None:
    command = typer.main.get_command(app).commands["predict"]  # type: ignore[attr-defined]
    typed = next(parameter.default for parameter in command.params if parameter.name == option)
    assert defaults(Detector.predict)[option] == defaults(Detector.__call__)[option] == typed


def test_what_every_model_file_sets_has_no_default_in_its_class() -> None:
    """Else a Config made in Python could differ from the file of its name in what nobody chose."""
    of_family: dict[str, list[dict[str, Any]]] = {}
    for name in cfg_names("models"):
        keys = read_yaml(cfg_folder() / "models" / f"{name}.yaml")
        of_family.setdefault(keys.pop("family"), []).append(keys)
    assert of_family.keys() == DETECTORS.keys()
    for family, files in of_family.items():
        always = set.intersection(*(set(keys) for keys in files))
        fields = DETECTORS[family].Config.model_fields
        assert always
        assert [key for key in always if not fields[key].is_required()] == []
