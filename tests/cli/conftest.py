"""A file that detects in milliseconds, and images to detect on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.exporters.tiny import TinyDetector
from yoloxkd.exporters.onnx import ExportOptions, export_onnx


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of two classes whose names look like markup."""
    detector = TinyDetector(["[red]", "<b>$x$_&"]).eval()
    return export_onnx(detector, tmp_path_factory.mktemp("tiny") / "tiny.onnx", ExportOptions(64))


def frame(seed: int = 0) -> np.ndarray:
    """(90, 120, 3) uint8 with something on it."""
    random = np.random.default_rng(seed)
    return cv2.resize(random.integers(0, 255, (9, 12, 3), dtype=np.uint8), (120, 90))


def put_image(file: Path, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(cv2.imencode(file.suffix, frame(seed))[1].tobytes())
    return file


def put_video(file: Path, frames: int = 20) -> Path:
    """Motion JPEG, so that a cut file still has whole frames."""
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = file.with_name("plain.avi")
    writer = cv2.VideoWriter(str(plain), cv2.VideoWriter_fourcc(*"MJPG"), 12.0, (120, 90))
    for number in range(frames):
        writer.write(frame(number))
    writer.release()
    plain.rename(file)
    return file
