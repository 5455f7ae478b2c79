"""Finds the reference vectors: YOLOXKD_VECTORS, else ../shared/vectors beside the repository, else tests/vectors."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent.parent


def vectors_folder(name: str, index: str = "index.json") -> Path:
    """The folder of one vector set, in the first place that has its index (a pattern)."""
    if "YOLOXKD_VECTORS" in os.environ:
        return Path(os.environ["YOLOXKD_VECTORS"]) / name
    beside = TESTS.parent.parent / "shared" / "vectors" / name
    return beside if any(beside.glob(index)) else TESTS / "vectors" / name


@dataclass(frozen=True)
class Case:
    """One case of a set: its parameters and its arrays."""

    folder: Path
    name: str
    params: dict[str, Any]
    arrays: frozenset[str]

    def array(self, name: str) -> np.ndarray:
        with np.load(self.folder / f"{self.name}.npz") as data:
            return np.asarray(data[name])

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        t = torch.from_numpy(np.array(self.array(name)))
        return t if dtype is None else t.to(dtype)

    def has(self, name: str) -> bool:
        return name in self.arrays

    def family(self, prefix: str) -> list[str]:
        """Names `prefix__...`, in order of their suffix when it is a number."""
        names = [n for n in self.arrays if n.startswith(prefix + "__")]
        return sorted(names, key=lambda n: (len(n), n))

    def __str__(self) -> str:
        return self.name


def cases(name: str, prefix: str = "") -> list[Any]:
    """pytest parameters: every case of a set whose file name starts with `prefix`; one skipped case when there is none."""
    folder = vectors_folder(name)
    if not (folder / "index.json").is_file():
        reason = f"reference vectors '{name}' are not at {folder} (set YOLOXKD_VECTORS)"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=f"{name}-absent")]
    index = json.loads((folder / "index.json").read_text())
    found = [
        Case(folder, Path(c["file"]).stem, c["params"], frozenset(c["arrays"]))
        for c in index["cases"]
        if c["file"].startswith(prefix)
    ]
    return [pytest.param(c, id=c.name) for c in found]


def padded(
    boxes: Tensor, box_image: Tensor, images: int, labels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged boxes (M, 4) with their image index -> padded boxes (B, G, 4), labels (B, G), mask (B, G)."""
    counts = [int((box_image == i).sum()) for i in range(images)]
    rows = max([*counts, 1])
    out = boxes.new_zeros(images, rows, 4)
    out_labels = torch.zeros(images, rows, dtype=torch.int64)
    mask = torch.zeros(images, rows, dtype=torch.bool)
    for i, n in enumerate(counts):
        out[i, :n] = boxes[box_image == i]
        mask[i, :n] = True
        if labels is not None:
            out_labels[i, :n] = labels[box_image == i]
    return out, out_labels, mask


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    """Equal relative to the largest entry."""
    atol = rtol * float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.detach().double(), expected.reshape(actual.shape), rtol=rtol, atol=atol)
