"""Checkpoints are written whole or not at all, and hold nothing that needs unpickling."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from yoloxkd.engine.checkpoint import is_checkpoint, random_state, restore_random_state, save_checkpoint
from yoloxkd.errors import UserError


def test_saved_files_load_with_weights_only(tmp_path: Path) -> None:
    save_checkpoint({"rng": random_state(), "weights": {"w": torch.ones(2)}}, tmp_path / "a" / "x.pt")
    raw = torch.load(tmp_path / "a" / "x.pt", weights_only=True)
    assert is_checkpoint(raw)
    assert not is_checkpoint({"model": 1})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.pt"]


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    save_checkpoint({"x": 1}, file)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        save_checkpoint({"x": lambda: None}, file)
    assert torch.load(file, weights_only=True)["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not write"):
        save_checkpoint({"x": 1}, tmp_path / "file" / "x.pt")


def test_random_states_come_back() -> None:
    saved = random_state()

    def draws() -> tuple[float, float, float, float]:
        return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))

    first = draws()
    assert draws() != first
    restore_random_state(saved)
    assert draws() == first
