"""`yoloxkd --version` and `yoloxkd doctor`: what a bug report needs."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from yoloxkd.cli import run
from yoloxkd.version import __version__


def test_the_versions_without_importing_torch() -> None:
    code = "import sys; from yoloxkd.cli import run; run(['--version']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"yoloxkd {__version__}",
        *(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "onnxruntime")),
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        "False",
    ]


def test_doctor_tells_what_an_issue_needs_and_no_personal_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "alice"
    home.mkdir()
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "YOLOXKD_HOME", "MPLCONFIGDIR", "HF_HOME", "TORCH_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == f"yoloxkd {__version__}"
    assert f"torch {version('torch')}" in lines
    starts = ["device cpu: ", "device cuda", "memory ", "shared memory ", "threads ", "extra tensorboard: tensorboard "]
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    assert "OMP_NUM_THREADS 7" in text
    assert "cache yoloxkd ~/.cache/yoloxkd, not there yet" in lines
    assert "cache torch ~/.cache/torch, not there yet" in lines
    assert "alice" not in text
