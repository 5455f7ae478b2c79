"""Base class of dense detectors: pyramid, two towers, predictors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from yoloxkd.nn.assigners.match import Match
from yoloxkd.nn.detector import Detector
from yoloxkd.ops.losses import full_precision
from yoloxkd.ops.points import grid_of
from yoloxkd.types import DenseOutput, Grid, Tap

Maps = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the predictors say, level by level, finest first; n predictions a cell.

    Attributes:
        classes: (B, n K, h, w) logits; boxes (B, n R, h, w) code; quality (B, n, h, w) logits, or None
    """

    classes: Sequence[Tensor]
    boxes: Sequence[Tensor]
    quality: Sequence[Tensor] | None = None


def flat(maps: Sequence[Tensor], per_cell: int = 1) -> Tensor:
    """L x (B, per_cell C, h, w) -> (B, A, C)"""
    if per_cell == 1:
        return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
    return torch.cat([m.unflatten(1, (per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], dim=1)


class DenseDetector(Detector[DenseOutput, Match]):
    """A detector whose head can be entered in the middle: anybody's maps go through the rest of a tower and its predictors.

    A subclass writes `pyramid`, `tower`, `predict`, `decode` and `scores`.

    Attributes:
        per_cell: predictions of a cell
        offset: where in its cell a prediction lies: 0.5, its center, or 0, its corner
        deviations: factors of a box code of anchors
    """

    per_cell: ClassVar[int] = 1
    offset: ClassVar[float] = 0.5
    deviations: ClassVar[tuple[float, float, float, float]] = (1.0, 1.0, 1.0, 1.0)

    def network(self, x: Tensor) -> DenseOutput:
        """The network on normalized input (B, 3, H, W); H and W must be multiples of `size_multiple`."""
        height, width = x.shape[-2:]
        self.check_size(height, width)
        backbone, features = self.pyramid(x)
        return self.on_features(features, (height, width), backbone)

    def on_features(self, features: Maps, image_size: tuple[int, int], backbone: Maps = ()) -> DenseOutput:
        """The head on neck maps of an input of image_size (H, W) px."""
        cls, reg = self.tower(Tap.CLS, features, stop=1), self.tower(Tap.REG, features, stop=1)
        predictions = self.predict(self.tower(Tap.CLS, cls, 1), self.tower(Tap.REG, reg, 1))
        return self.assemble(predictions, image_size, backbone, features, cls, reg)

    @abstractmethod
    def pyramid(self, x: Tensor) -> tuple[Maps, Maps]:
        """The backbone's maps and the neck's, of normalized input."""

    @abstractmethod
    def tower(self, branch: Tap, maps: Maps, start: int = 0, stop: int | None = None) -> Maps:
        """The maps of all levels through the blocks start .. stop - 1 of a branch's tower (CLS or REG); None: to its end."""

    @abstractmethod
    def predict(self, cls: Maps, reg: Maps) -> Predictions:
        """The predictors on what the towers end with."""

    @abstractmethod
    def decode(self, raw: Tensor, grid: Grid) -> Tensor:
        """Box code (B, A, R) -> boxes (B, A, 4) px, float32 at least."""

    def grid(self, sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], device: torch.device) -> Grid:
        """Where the predictions of levels of sizes L x (h, w) lie in an input of image_size (H, W) px, without anchors."""
        return grid_of(sizes, self.spec.strides, device, self.offset, self.per_cell)

    def anchors(self, grid: Grid) -> Tensor | None:
        """(A, 4) px, for a detector that has any."""
        return None

    def assemble(
        self,
        predictions: Predictions,
        image_size: tuple[int, int],
        backbone: Maps = (),
        features: Maps = (),
        cls_features: Maps = (),
        reg_features: Maps = (),
    ) -> DenseOutput:
        """The predictions on an input of image_size (H, W) px as one output, with the maps that led there."""
        sizes = tuple((m.shape[2], m.shape[3]) for m in predictions.boxes)
        grid = self.grid(sizes, image_size, predictions.boxes[0].device)
        grid.anchors = self.anchors(grid)
        raw = flat(predictions.boxes, self.per_cell)
        return DenseOutput(
            backbone_features=backbone,
            features=features,
            cls_features=cls_features,
            reg_features=reg_features,
            cls_logits=flat(predictions.classes, self.per_cell),
            box_raw=raw,
            boxes=self.decode(raw, grid),
            quality=None if predictions.quality is None else flat(predictions.quality, self.per_cell).squeeze(-1),
            grid=grid,
            image_size=image_size,
        )

    def scores(self, out: DenseOutput) -> Tensor:
        """(B, A, K) the score of a detection, 0 to 1: class probability, times quality where there is one."""
        classes = full_precision(out.cls_logits).sigmoid()
        return classes if out.quality is None else classes * full_precision(out.quality).sigmoid().unsqueeze(-1)

    @property
    def code_in_strides(self) -> bool:
        """Whether lengths of the box code are in strides of their level; else in px."""
        return True

    @property
    def root_of_score(self) -> bool:
        """Whether a score is the square root of class times quality."""
        return False

    def candidates(self, out: DenseOutput) -> tuple[Tensor, Tensor]:
        return out.boxes, self.scores(out)

    def objectness(self, out: DenseOutput) -> Tensor | None:
        """(B, A) logits whose probability that of every class is multiplied by; None: class logits speak for themselves."""
        return out.quality if self.spec.quality == "objectness" else None

    def level_sizes(self, out: DenseOutput) -> tuple[int, ...]:
        return tuple(h * w * out.grid.per_cell for h, w in out.grid.sizes)

    def class_probability(self, out: DenseOutput) -> Tensor:
        """(B, A, K) the probability PGD's quality reads: for YOLOX class times objectness, else the class alone."""
        return full_precision(out.cls_logits).sigmoid()
