"""What every detector of the package is: one contract, so that any of them can teach any other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from yoloxkd.types import DenseOutput, Losses, Targets


@dataclass(frozen=True, slots=True)
class InputConvention:
    """How a detector wants its pixels; the batch itself is uint8 RGB for everyone.

    bgr        swap the channels first
    mean, std  per channel, in the detector's own channel order and in 0..255 units
    pad_value  RGB value (0..255) of letterbox padding
    """

    bgr: bool = False
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pad_value: tuple[int, int, int] = (114, 114, 114)

    def describe(self) -> str:
        order = "BGR" if self.bgr else "RGB"
        if self.mean == (0.0, 0.0, 0.0) and self.std == (1.0, 1.0, 1.0):
            return f"{order} 0-255"
        return f"{order} mean {tuple(round(m, 2) for m in self.mean)} std {tuple(round(s, 2) for s in self.std)}"


@dataclass(frozen=True, slots=True)
class Taps:
    """Channels of the maps a distiller can read, one number a level, finest first."""

    features: tuple[int, ...]
    cls_features: tuple[int, ...]
    reg_features: tuple[int, ...]


class DenseDetector(nn.Module, ABC):
    """A detector that predicts at every location of its feature levels.

    Subclasses set `levels` (strides in px, finest first), `names` (class names), `input` and `taps`, and write
    `dense`, `losses` and `scores`.
    """

    Config: ClassVar[type[BaseModel]]
    family: ClassVar[str]
    class_predictors: ClassVar[tuple[str, ...]] = ()
    """State-dict prefixes of the layers whose first dimension is the number of classes."""

    cfg: BaseModel
    levels: tuple[int, ...]
    names: list[str]
    input: InputConvention
    taps: Taps

    @property
    def size_multiple(self) -> int:
        """H and W of the input must be multiples of it (px): the coarsest stride, where a detector does not allow more."""
        return max(self.levels)

    def pretrain(self) -> str | None:
        """Give an untrained detector the published weights of its parts; a sentence for the log, None: it has none.

        May change `cfg`, so that a checkpoint rebuilds what was trained.
        """
        return None

    def forward(self, images: Tensor) -> DenseOutput:
        """images (B, 3, H, W) RGB, 0..255, uint8 or float; H and W multiples of `size_multiple`."""
        return self.dense(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """RGB 0..255 (B, 3, H, W), uint8 or float -> the detector's own convention, in the dtype of its weights."""
        x = images.to(next(self.parameters()).dtype)
        if self.input.bgr:
            x = x.flip(1)
        if self.input.mean != (0.0, 0.0, 0.0) or self.input.std != (1.0, 1.0, 1.0):
            mean = torch.tensor(self.input.mean, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
            std = torch.tensor(self.input.std, dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
            x = (x - mean) / std
        return x

    @abstractmethod
    def dense(self, x: Tensor) -> DenseOutput:
        """The network itself, on normalised input (B, 3, H, W)."""

    @abstractmethod
    def losses(self, out: DenseOutput, targets: Targets) -> Losses:
        """Training losses by name, in float32 whatever the autocast dtype; the sum of their quotients is the task loss."""

    def class_probability(self, out: DenseOutput) -> Tensor:
        """(B, A, K) the probability PGD's quality reads: for YOLOX class times objectness, else the class alone."""
        return out.cls_logits.float().sigmoid()

    @abstractmethod
    def scores(self, out: DenseOutput) -> Tensor:
        """(B, A, K) the score of a detection, 0 to 1, as used by NMS and by the metric."""

    def final_phase(self, on: bool) -> None:
        """Told by the engine when the last epochs (no strong augmentation) begin; YOLOX switches its L1 loss on."""
