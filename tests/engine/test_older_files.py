"""Checkpoints that version 0.1.0 wrote: its students detect the same, its runs go on the same."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_toy
from tests.engine.runs import rows
from yoloxkd import Detector, Trainer

FILES = Path(__file__).parent.parent / "data_files" / "v0.1.0"
DETECTED = {
    "boxes": [
        [39.37205505371094, 56.6380615234375, 64.0, 64.0],
        [64.0, 59.048213958740234, 64.0, 64.0],
        [64.0, 32.61321258544922, 64.0, 64.0],
        [37.01069259643555, 25.213321685791016, 64.0, 52.53865432739258],
    ],
    "scores": [0.4022761285305023, 0.1341833770275116, 0.12730063498020172, 0.04671014845371246],
    "labels": [1, 1, 1, 1],
}
"""What version 0.1.0 detected in `picture()` at a score of 0.03 and more."""
LOSSES = {
    "loss": 20.6876, "loss/box": 4.57531, "loss/obj": 5.24014, "loss/cls": 1.22743,
    "loss/fgd/fg/s8": 2.47874, "loss/fgd/global/s16": 0.00682725, "loss/pgd/cls_bg/s32": 0.0548867,
    "loss/pgd/reg_attention/s8": 0.000279317,
}  # fmt: skip
"""Of the epoch in whose middle the run was interrupted, as version 0.1.0 continued it."""


def unpacked(name: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.decompress((FILES / f"{name}.gz").read_bytes()))
    return folder / name


def picture() -> np.ndarray:
    """Two rectangles on a pattern, (64, 64, 3) uint8."""
    y, x = np.mgrid[0:64, 0:64]
    ground = [110 + (x * 7 + y * 3) % 30, 110 + (x * 5 + y * 11) % 30, 110 + (x + y * 13) % 30]
    out = np.stack(ground, -1).astype(np.uint8)
    out[8:40, 10:34] = (220, 20, 20)
    out[30:56, 36:60] = (20, 60, 220)
    return out


def test_a_student_detects_the_same(tmp_path: Path) -> None:
    detector = Detector(str(unpacked("best.pt", tmp_path)), device="cpu")
    assert detector.names == ["red", "blue"]
    (found,) = detector.predict([picture()], conf=0.03)
    np.testing.assert_allclose(found.boxes, DETECTED["boxes"], atol=1e-2)
    np.testing.assert_allclose(found.scores, DETECTED["scores"], rtol=1e-3)
    assert found.labels.tolist() == DETECTED["labels"]


def test_a_run_interrupted_in_an_epoch_goes_on(tmp_path: Path) -> None:
    """Weights, averages, optimizer, adapters, the measured weight of PGD and the sums of the epoch are taken over."""
    last = unpacked("last.pt", tmp_path / "run")
    raw = torch.load(io.BytesIO(last.read_bytes()), weights_only=True)
    raw["recipe"]["data"] = str(write_toy(tmp_path / "toy", images=24))  # the folders have moved
    raw["recipe"]["teacher"]["models"] = [str(unpacked("best.pt", tmp_path))]
    torch.save(raw, last)
    Trainer(resume=last).fit()
    (row,) = rows(last.parent)
    assert row["epoch"] == "2"
    assert {name: float(row[name]) for name in LOSSES} == pytest.approx(LOSSES, rel=2e-3)
