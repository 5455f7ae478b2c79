"""The `Detector` contract: any detector can teach any other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.ops.constants import constant
from yoloxkd.ops.nms import NMS
from yoloxkd.types import Detections, DetectorOutput, Draw, Losses, Tap, Targets

Quality = Literal["objectness", "localization"]

O = TypeVar("O", bound=DetectorOutput)
M = TypeVar("M")


@dataclass(frozen=True, slots=True)
class InputConvention:
    """How a detector wants its pixels; the batch itself is uint8 RGB for everyone.

    Attributes:
        bgr: swap the channels first
        mean, std: per channel, in the detector's own channel order and in 0..255 units
        pad_value: RGB value (0..255) of letterbox padding
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
class BoxCode:
    """What `box_raw` holds.

    Attributes:
        kind: "cells": YOLOX's shift of the center in strides and logarithm of the size in strides;
            "distances" to the four sides; "distributions" of these, `bins` logits a side; "anchors": shift
            and logarithm of the size in anchor sides; "points": shifts of points whose moments are the box;
            "masks": there is none
    """

    kind: Literal["cells", "distances", "distributions", "anchors", "points", "masks"]
    bins: int | None = None


@dataclass(frozen=True, slots=True)
class DetectorSpec:
    """What a detector is to others, declared once.

    Attributes:
        names: class names, in label order
        strides: px, of the levels that it predicts on, finest first
        channels: {tap: {stride: channels}} of the maps that a distiller can read, finest first
        stable_locations: prediction i of one forward pass and prediction i of another are about the same
            place; proposals are not
        pairs_per_level: what goes into NMS. None: the best class of each location (YOLOX); a number: every
            class, that many of the best (location, class) pairs of each level (detectors on an FPN)
        quality: what `DenseOutput.quality` is, if there is one. "objectness": whether there is any object,
            and the probability of a class is its own times that; "localization": how well the box fits
        reads_predictions: `assign` reads the output's classes and boxes (and its objectness), which another detector's
            may stand in for; else the grid and the targets alone decide, or what only this family predicts
        masks: it trains and gives instance masks
    """

    names: tuple[str, ...]
    strides: tuple[int, ...]
    channels: Mapping[Tap, Mapping[int, int]]
    box_code: BoxCode
    input: InputConvention
    stable_locations: bool = True
    pairs_per_level: int | None = None
    quality: Quality | None = None
    reads_predictions: bool = False
    masks: bool = False

    @property
    def predicts_for(self) -> str:
        """What a detector without stable locations gives its predictions to."""
        return "cells of its own grids" if self.box_code.kind == "masks" else "proposals"


class Detector(nn.Module, ABC, Generic[O, M]):
    """A network with four verbs: `assign`, `losses`, `candidates` and `detect`. O is what it says, M who answers for what.

    A subclass sets `spec` when it is built, and writes `network`, `assign`, `losses` and `candidates`.
    """

    Config: ClassVar[type[BaseModel]]
    family: ClassVar[str]
    class_predictors: ClassVar[tuple[str, ...]] = ()
    """State-dict prefixes of the layers whose first dimension is the number of classes."""
    trains_without_masks: ClassVar[bool] = True
    """Of a detector whose spec has masks: whether it can learn boxes from data that has none."""
    run_state: ClassVar[tuple[str, ...]] = ()
    """State-dict prefixes of what belongs to one training run: neither loaded with weights nor inherited, but resumed."""

    channels_last_on_cpu: ClassVar[bool] = True
    """Whether a training step on a CPU is faster with NHWC maps: with few channels and depthwise convolutions, as in YOLOX."""

    spec: DetectorSpec

    def __init__(self, cfg: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.cfg = cfg

    @property
    def names(self) -> list[str]:
        """Class names, in label order."""
        return list(self.spec.names)

    @property
    def size_multiple(self) -> int:
        """H and W of the input must be multiples of it (px): the coarsest stride, where a detector does not allow more."""
        return max(self.spec.strides)

    def pretrain(self) -> str | None:
        """Give an untrained detector the published weights of its parts; a sentence for the log, None: it has none.

        May change `cfg`, so that a checkpoint rebuilds what was trained.
        """
        return None

    def forward(self, images: Tensor) -> O:
        """images (B, 3, H, W) RGB, 0..255, uint8 or float; H and W multiples of `size_multiple`."""
        return self.network(self.normalize(images))

    def check_size(self, height: int, width: int) -> None:
        """UserError: an input of this size (px) does not divide into cells."""
        if height % self.size_multiple or width % self.size_multiple:
            raise UserError(
                f"{self.family.upper()} got an image of {height}x{width} (height x width), but both must be multiples of "
                f"{self.size_multiple}; letterbox it or choose another imgsz."
            )

    def normalize(self, images: Tensor) -> Tensor:
        """RGB 0..255 (B, 3, H, W), uint8 or float -> the detector's own convention, in the dtype of its weights."""
        x, convention = images.to(next(self.parameters()).dtype), self.spec.input
        if convention.bgr:
            x = x.flip(1)
        if convention.mean != (0.0, 0.0, 0.0) or convention.std != (1.0, 1.0, 1.0):
            mean = constant(convention.mean, x.dtype, x.device).view(1, 3, 1, 1)
            std = constant(convention.std, x.dtype, x.device).view(1, 3, 1, 1)
            x = (x - mean) / std
        return x

    @abstractmethod
    def network(self, x: Tensor) -> O:
        """The network itself, on normalized input (B, 3, H, W)."""

    @abstractmethod
    def assign(self, out: O, targets: Targets, draw: Draw = Draw()) -> M:
        """Who answers for what, without gradient: it follows from the arguments alone, chance included."""

    @abstractmethod
    def losses(self, out: O, targets: Targets, match: M) -> Losses:
        """Training losses by name, in float32 whatever the autocast dtype; the sum of their quotients is the task loss."""

    @abstractmethod
    def candidates(self, out: O) -> tuple[Tensor, Tensor]:
        """What NMS and an exported graph read: boxes (B, N, 4) px and scores (B, N, K), 0 to 1, float32 at least."""

    def level_sizes(self, out: O) -> tuple[int, ...]:
        """How many of the candidates each feature level has, in their order; one level, where a detector knows none."""
        return (self.candidates(out)[0].shape[1],)

    def detect(self, out: O, nms: NMS) -> list[Detections]:
        """The detections of each image, in px of the network input."""
        return self.after_nms(*self.candidates(out), self.level_sizes(out), nms)

    def after_nms(self, boxes: Tensor, scores: Tensor, levels: Sequence[int], nms: NMS) -> list[Detections]:
        """Candidates (B, N, 4) px and (B, N, K) of these levels -> the detections of each image that NMS keeps."""
        survivors = nms(boxes.float(), scores.float(), levels, self.spec.pairs_per_level)
        return [Detections(b.cpu().numpy(), s.cpu().numpy(), k.cpu().numpy(), self.names) for b, s, k in survivors]

    def class_probability(self, out: O) -> Tensor:
        """(B, N, K) the probability of each class at each candidate that a distiller reads; the score, if there is no other."""
        return self.candidates(out)[1]

    def stage_lines(self) -> dict[str, str]:
        """What `yoloxkd show` says of each stage: name -> a line; nothing, where there is but one."""
        return {}

    def final_phase(self, on: bool) -> None:
        """Told by the engine when the last epochs (no strong augmentation) begin; YOLOX switches its L1 loss on."""
