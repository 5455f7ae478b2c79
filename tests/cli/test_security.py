"""No file is trusted, and nothing is fetched that was not asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, TINY
from yoloxkd.cli import run

QUICK = [
    "--epochs",
    "1",
    "--batch",
    "8",
    "--imgsz",
    "64",
    "--device",
    "cpu",
    *(f"--set={k}={v}" for k, v in TINY.items() if k != "callbacks.plots"),  # what draws is imported too
]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("use", ["teacher", "student", "resume", "val", "show", "export"])
def test_a_checkpoint_with_code_is_refused_and_the_code_does_not_run(
    use: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, file = tmp_path / "mark", tmp_path / "run" / "last.pt"
    file.parent.mkdir()
    weights = {"backbone.backbone.stem.conv.conv.weight": torch.zeros(1)}
    torch.save({"format": "yoloxkd-checkpoint-1", "kind": "run", "model": weights, "extra": Trap(mark)}, file)
    train = ["train", "--data", str(toy), "--out", str(tmp_path / "out"), *QUICK]
    arguments = {
        "teacher": [*train, "--student", "yolox-nano", "--teacher", str(file)],
        "student": [*train, "--student", str(file)],
        "resume": ["train", "--resume", str(file.parent)],
        "val": ["val", str(file), "--data", str(toy)],
        "show": ["show", str(file)],
        "export": ["export", str(file), "--format", "onnx"],
    }[use]
    assert run(arguments) == 2
    sentence = capsys.readouterr().err.strip()
    assert "holds objects besides tensors" in sentence
    assert "system" in sentence
    assert len(sentence.splitlines()) == 1
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_yaml_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "x.yaml").write_text(f"path: !!python/object/apply:os.system ['touch {mark}']\n")
    assert run(["train", "--student", "yolox-nano", "--data", str(tmp_path / "x.yaml")]) == 2
    assert run(["train", "--recipe", str(tmp_path / "x.yaml")]) == 2
    assert (
        run(["train", "--student", "yolox-nano", f"--set=data=!!python/object/apply:os.system ['touch {mark}']"]) == 2
    )
    assert capsys.readouterr().err.count("yoloxkd: ") == 3
    assert not mark.exists()


@pytest.mark.slow
def test_a_run_opens_no_connection(toy: Path, tmp_path: Path) -> None:
    """Imports included: nothing looks for updates, models or telemetry."""
    script = f"""
import socket, sys
asked = []
def refuse(*a, **k):
    asked.append(a)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
from yoloxkd.cli import run
status = run({["train", "--student", "yolox-nano", "--data", str(toy), "--out", str(tmp_path / "r"), *QUICK]!r})
status = status or run(["val", {str(tmp_path / "r" / "best.pt")!r}, "--data", {str(toy)!r}, "--device", "cpu", "--workers", "0"])
sys.exit(f"asked for {{asked}}" if asked else status)
"""
    quiet = ("NO_ALBUMENTATIONS_UPDATE", "HF_HUB_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if k not in quiet}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
