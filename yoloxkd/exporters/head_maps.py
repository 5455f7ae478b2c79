"""Raw head outputs: description in the metadata, and decoding by NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from yoloxkd.errors import UserError

Side = Annotated[int, Field(ge=1, le=16_384)]
Four = Annotated[list[float], Field(min_length=4, max_length=4)]


class HeadLevel(BaseModel):
    """One feature level.

    stride                   px
    classes, quality, boxes  names of its tensors: (N, n K, h, w) logits, (N, n, h, w) logits or None, (N, n R, h, w) code
    unit                     px that a distance of 1 in the box code is
    anchors                  of a cell, xyxy px around its location; none: one prediction a cell without anchor
    """

    model_config = ConfigDict(allow_inf_nan=False)

    stride: Side
    classes: str
    quality: str | None
    boxes: str
    unit: float = Field(gt=0)
    anchors: list[Four] = Field([], max_length=1000)


class HeadMaps(BaseModel):
    """What the tensors of a raw file are, and how boxes and scores are made of them; `export/README.md` has the formulas.

    box_code     "cells", "distances", "distributions" or "anchors", as in `nn.detector.BoxCode`
    bins         logits a side, of distributions
    deviations, largest_log   of a code of anchors: its factors, and the largest logarithm of a side
    activation   of classes and quality
    offset       cell (row i, column j) has its location at ((j + offset) step, (i + offset) step) px
    step         "stride", or H // h and W // w
    score        "class", class times quality ("product"), or the square root of that ("root")
    levels       finest first
    """

    model_config = ConfigDict(allow_inf_nan=False)

    box_code: Literal["cells", "distances", "distributions", "anchors"]
    bins: int | None = Field(None, ge=2, le=1025)
    deviations: Four = [1.0, 1.0, 1.0, 1.0]
    largest_log: float = Field(gt=0)
    activation: Literal["sigmoid"]
    offset: float = Field(ge=0, le=1)
    step: Literal["stride", "size // cells"]
    score: Literal["class", "product", "root"]
    levels: list[HeadLevel] = Field(min_length=1, max_length=64)

    def tensors(self) -> list[str]:
        """Names of all tensors, level by level."""
        return [n for level in self.levels for n in (level.classes, level.quality, level.boxes) if n is not None]

    def count(self, outputs: Mapping[str, np.ndarray]) -> int:
        """How many locations the tensors have."""
        return sum(max(len(v.anchors), 1) * int(np.prod(outputs[v.boxes].shape[2:])) for v in self.levels)

    def locations(
        self, outputs: Mapping[str, np.ndarray], size: tuple[int, int], classes: int, path: Path
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (N, A, 4) px and scores (N, A, K) float32 of an input of size (H, W) px.

        UserError: a tensor has another shape than the description says.
        """
        parts = [self._level(level, outputs, size, classes, path) for level in self.levels]
        return np.concatenate([b for b, _ in parts], axis=1), np.concatenate([s for _, s in parts], axis=1)

    def _level(
        self, level: HeadLevel, outputs: Mapping[str, np.ndarray], size: tuple[int, int], classes: int, path: Path
    ) -> tuple[np.ndarray, np.ndarray]:
        n, batch = max(len(level.anchors), 1), len(outputs[level.boxes])
        h, w = (-(-length // level.stride) for length in size)

        def rows(name: str, channels: int) -> np.ndarray:
            x = outputs[name]
            if x.shape != (batch, n * channels, h, w):
                raise UserError(
                    f"{path}: its output {name} has the shape {x.shape} where its metadata promises "
                    f"{(batch, n * channels, h, w)}; export the checkpoint again"
                )
            return x.reshape(batch, n, channels, h, w).transpose(0, 3, 4, 1, 2).reshape(batch, h * w * n, channels)

        scores = _sigmoid(rows(level.classes, classes))
        if level.quality is not None and self.score != "class":
            scores *= _sigmoid(rows(level.quality, 1))
        code = rows(level.boxes, 4 * (self.bins or 1))
        boxes = self._boxes(code, level, self._points(level, (h, w), size).repeat(n, axis=0))
        return boxes.astype(np.float32), np.sqrt(scores) if self.score == "root" else scores

    def _points(self, level: HeadLevel, cells: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
        """(h w, 2) x, y px"""
        steps = [level.stride] * 2 if self.step == "stride" else [size[0] // cells[0], size[1] // cells[1]]
        y, x = ((np.arange(n, dtype=np.float32) + self.offset) * step for n, step in zip(cells, steps, strict=True))
        return np.stack(np.broadcast_arrays(x, y[:, None]), axis=-1).reshape(-1, 2).astype(np.float32)

    def _boxes(self, code: np.ndarray, level: HeadLevel, points: np.ndarray) -> np.ndarray:
        """Code (N, A, R) of locations (A, 2) px -> boxes (N, A, 4) px."""
        if self.box_code in ("distances", "distributions"):
            if self.bins is not None:
                bins = code.reshape(*code.shape[:2], 4, self.bins)
                share = np.exp(bins - bins.max(axis=-1, keepdims=True))
                code = (share / share.sum(axis=-1, keepdims=True)) @ np.arange(self.bins, dtype=np.float32)
            far = code * np.float32(level.unit)
            return np.concatenate([points - far[..., :2], points + far[..., 2:]], axis=-1)
        if self.box_code == "cells":
            center = points + (code[..., :2] - np.float32(0.5)) * np.float32(level.unit)
            with np.errstate(over="ignore"):
                side = np.exp(code[..., 2:]) * np.float32(level.unit)
        else:
            around = np.tile(np.array(level.anchors, np.float32).reshape(-1, 4), (len(points) // len(level.anchors), 1))
            anchor_side = around[:, 2:] - around[:, :2]
            code = code * np.array(self.deviations, np.float32)
            center = points + (around[:, :2] + around[:, 2:]) / 2 + code[..., :2] * anchor_side
            side = np.exp(np.clip(code[..., 2:], -self.largest_log, self.largest_log)) * anchor_side
        return np.concatenate([center - side / 2, center + side / 2], axis=-1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), in one temporary: of many classes this is what decoding takes time for."""
    y: np.ndarray = np.clip(x, -80, 80)
    np.exp(np.negative(y, out=y), out=y)
    y += 1
    np.reciprocal(y, out=y)
    return y
