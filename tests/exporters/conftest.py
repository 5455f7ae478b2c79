"""Exported files of the tiny detector, made once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.exporters.tiny import TinyDetector
from yoloxkd.exporters.onnx import ExportOptions, export_onnx

CPP = Path(__file__).resolve().parents[2] / "export" / "cpp"
SIZE = 64
CONF = 0.3
MAX_DET = 40


@pytest.fixture(scope="session")
def detector() -> TinyDetector:
    return TinyDetector(["red", "blue", "green"]).eval()


@pytest.fixture(scope="session")
def pixels() -> Tensor:
    """(5, 3, 64, 64) uint8: smooth random images."""
    g = torch.Generator().manual_seed(3)
    coarse = torch.rand(5, 3, 9, 9, generator=g)
    return (torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear") * 255).to(torch.uint8)


def exported(detector: TinyDetector, folder: Path, name: str, **options: object) -> Path:
    settings = ExportOptions(SIZE, conf=CONF, max_det=MAX_DET, **options)  # type: ignore[arg-type]
    return export_onnx(detector, folder / f"{name}.onnx", settings, source_digest="abc123")


@pytest.fixture(scope="session")
def nms_file(detector: TinyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(detector, tmp_path_factory.mktemp("nms"), "nms")


@pytest.fixture(scope="session")
def dynamic_file(detector: TinyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(detector, tmp_path_factory.mktemp("dynamic"), "dynamic", dynamic=True)


@pytest.fixture(scope="session")
def raw_file(detector: TinyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(detector, tmp_path_factory.mktemp("raw"), "raw", nms=False)


@pytest.fixture(scope="session")
def half_file(detector: TinyDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(detector, tmp_path_factory.mktemp("half"), "half", half=True)


@pytest.fixture(scope="session")
def cpp_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ consumer, built with the ONNX Runtime of ONNXRUNTIME_ROOT or of the system."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("there is no cmake or no C++ compiler")
    build, root = tmp_path_factory.mktemp("build"), os.environ.get("ONNXRUNTIME_ROOT", "")
    configure = ["cmake", "-S", str(CPP), "-B", str(build), f"-DONNXRUNTIME_ROOT={root}"]
    if subprocess.run(configure, capture_output=True, check=False).returncode:
        pytest.skip("ONNX Runtime (ONNXRUNTIME_ROOT), stb_image or nlohmann-json is not there to build with")
    subprocess.run(["cmake", "--build", str(build)], capture_output=True, check=True)
    return build / "detect"
