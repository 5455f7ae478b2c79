"""Checkpoints of mmdetection 3 with the training log beside the weights are read without mmengine, and nothing of them runs."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from yoloxkd.errors import UserError
from yoloxkd.nn.weights.load import load_checkpoint_file

NAME = "mmengine.logging.history_buffer"


class Buffer:
    """The parts of mmengine's class that are in a file: two arrays, and in newer versions its methods."""

    methods: dict[str, Any] = {}

    def __init__(self, values: list[float], *, with_methods: bool) -> None:
        self.max_length = 1_000_000
        self._log_history, self._count_history = np.array(values), np.ones(len(values), np.int64)
        self.with_methods = with_methods

    def mean(self) -> float:
        raise AssertionError("a method of the file was called")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"statistics_methods": {"mean": type(self).mean}} if self.with_methods else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise AssertionError("the file's class was built")


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> type[Buffer]:
    """The class under mmengine's name, importable while a file is written; `gone` takes it away."""
    kind = type("HistoryBuffer", (Buffer,), {"__module__": NAME, "mean": Buffer.mean})
    kind.mean = lambda self: Buffer.mean(self)  # type: ignore[attr-defined]
    kind.mean.__module__, kind.mean.__qualname__ = NAME, "HistoryBuffer.mean"  # type: ignore[attr-defined]
    for name in ("mmengine", "mmengine.logging", NAME):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[NAME].HistoryBuffer = kind  # type: ignore[attr-defined]
    return kind


def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mmengine", "mmengine.logging", NAME):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("with_methods", [False, True])
def test_the_weights_come_and_the_log_is_dropped(
    buffer: type[Buffer], with_methods: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = {"train/loss": buffer([1.5, 0.5], with_methods=with_methods), "empty": buffer([], with_methods=with_methods)}
    raw = {"meta": {"epoch": 1, "best": np.float64(0.3)}, "state_dict": {"w": torch.arange(3.0)}, "message_hub": log}
    torch.save(raw, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    assert (b"getattr" in content) == with_methods
    gone(monkeypatch)
    allowed = set(torch.serialization.get_safe_globals())
    found = load_checkpoint_file(tmp_path / "x.pth")
    assert found["state_dict"]["w"].tolist() == [0, 1, 2]
    assert found["meta"]["epoch"] == 1
    assert not any(vars(one) for one in found["message_hub"].values())
    assert "mmengine" not in sys.modules
    assert set(torch.serialization.get_safe_globals()) == allowed


class Runs:
    """An object that wants to call something when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def marker(*words: str) -> None:
    raise AssertionError(f"the file called a function: {words}")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (lambda buffer: Runs(marker, "x"), "tests.nn.test_mmdet_history.marker"),
        (lambda buffer: Runs(getattr, np.zeros(1), "tofile"), "getattr"),
        (lambda buffer: Runs(getattr, Runs(getattr, buffer, "mean"), "__globals__"), "getattr"),
        (lambda buffer: Runs(eval, "1"), "eval"),
    ],
    ids=["a function", "a method of an array", "further into a method", "eval"],
)
def test_anything_else_beside_the_log_is_refused(
    buffer: type[Buffer], extra: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = buffer([1.0], with_methods=True)
    torch.save({"state_dict": {"w": torch.zeros(2)}, "message_hub": log, "x": extra(buffer)}, tmp_path / "x.pth")
    gone(monkeypatch)
    with pytest.raises(
        UserError, match=rf"holds objects besides tensors \({named}\), and loading those could run code"
    ):
        load_checkpoint_file(tmp_path / "x.pth")


def test_arrays_without_a_log_are_refused_as_before(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": np.zeros(3)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds objects besides tensors \(numpy\._core\.multiarray\._reconstruct\)"):
        load_checkpoint_file(tmp_path / "x.pth")


def test_a_file_of_the_older_format(buffer: type[Buffer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"state_dict": {"w": torch.ones(2)}, "message_hub": {"loss": buffer([2.0], with_methods=True)}}
    torch.save(raw, tmp_path / "x.pth", _use_new_zipfile_serialization=False, pickle_module=pickle)
    gone(monkeypatch)
    assert load_checkpoint_file(tmp_path / "x.pth")["state_dict"]["w"].tolist() == [1, 1]
