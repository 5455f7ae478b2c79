"""What a run says about where it came from."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from tests.engine.runs import StopAt
from yoloxkd import Trainer
from yoloxkd.engine.provenance import git_state, provenance
from yoloxkd.errors import Interrupted


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_git_state_names_the_commit_and_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q", "-b", "trunk")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "remote", "add", "origin", "https://name:secret@example.org/x.git")
    state = git_state(tmp_path)
    assert state == {"commit": git(tmp_path, "rev-parse", "HEAD"), "branch": "trunk", "changed": []}
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("3")
    state = git_state(tmp_path / "sub")
    assert state is not None
    assert state["changed"] == ["a.py", "sub/"]
    monkeypatch.setenv("PATH", str(tmp_path))  # no git program
    assert git_state(tmp_path) is None


def test_versions_command_and_machine_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["yoloxkd", "train", "--out", "a b"])
    about = provenance(torch.device("cpu"))
    assert {"torch", "numpy", "torchvision", "timm", "albumentations", "onnxruntime", "pydantic"} <= set(
        about["packages"]
    )
    assert shlex.split(about["command"]) == ["yoloxkd", "train", "--out", "a b"]
    assert about["device"] == "cpu"
    assert about["threads"] == torch.get_num_threads()
    assert all(about[key] for key in ("yoloxkd", "python", "folder", "host", "system", "machine", "cores", "started"))


def test_a_resume_is_added_to_the_record(toy: Path, tmp_path: Path) -> None:
    options = {"student": "yolox-nano", "epochs": 2, "batch": 8, "imgsz": 64, "device": "cpu", "data": str(toy)}
    settings = TINY | {"callbacks.plots": False}
    with pytest.raises(Interrupted):
        Trainer(**options, set=settings, out=tmp_path / "run", callbacks=[StopAt(4)]).fit()  # type: ignore[arg-type]
    first = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "finished" not in first
    Trainer(resume=tmp_path / "run").fit()
    about = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert about["started"] == first["started"]
    assert [again["epoch"] for again in about["resumed"]] == [2]
    assert about["finished"] >= about["resumed"][0]["started"]
    assert "ended by Interrupted: stopped by SIGINT" in (tmp_path / "run" / "train.log").read_text()
