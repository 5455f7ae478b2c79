"""OpenVINO, where it is installed, gives what ONNX Runtime gives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from tests.conftest import REPOSITORY
from yoloxkd.errors import UserError
from yoloxkd.exporters.runtime import OnnxPredictor

INSTALLED = importlib.util.find_spec("openvino") is not None


@pytest.mark.skipif(not INSTALLED, reason="the optional package openvino is not installed")
@pytest.mark.parametrize("file", ["nms_file", "raw_file", pytest.param("dynamic_file", marks=pytest.mark.slow)])
def test_the_same_detections(file: str, pixels: Tensor, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(file)
    one, other = (OnnxPredictor(path, runtime=runtime)(pixels) for runtime in ("onnxruntime", "openvino"))
    for a, b in zip(one, other, strict=True):
        assert len(a) > 0
        assert a.labels.tolist() == b.labels.tolist()
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)


TWO_SESSIONS = """
import gc, signal, subprocess, sys
from pathlib import Path
from yoloxkd.exporters.openvino_session import OpenVinoSession
signal.signal(signal.SIGCHLD, lambda number, frame: print("a child has ended"))
first, second = (OpenVinoSession(Path(sys.argv[1]), 1) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
subprocess.run([sys.executable, "-c", ""])
"""


@pytest.mark.skipif(not INSTALLED, reason="the optional package openvino is not installed")
def test_signals_after_two_sessions_do_not_end_the_process(nms_file: Path) -> None:
    """torch's data loader handles SIGCHLD; the signal stacks of two cores of OpenVINO were in each other's way."""
    command = [sys.executable, "-X", "faulthandler", "-c", TWO_SESSIONS, str(nms_file)]  # it sets a signal stack up
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a child has ended" in done.stdout


@pytest.mark.skipif(INSTALLED, reason="openvino is installed")
def test_without_it_the_sentence_says_how_to_get_it(nms_file: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'yoloxkd\[openvino\]'"):
        OnnxPredictor(nms_file, runtime="openvino")
