"""Value types that several rooms exchange.

Shape legend, used in every docstring of the package:
    B images of a batch, G padded ground-truth rows, A points (or anchors) over all levels, L levels, K classes,
    H, W pixels of the network input, h, w cells of one level. Boxes are x1, y1, x2, y2 in pixels of the network
    input (x right, y down, width = x2 - x1), unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from yoloxkd.detections import Detections as Detections
from yoloxkd.losses import TASK as TASK
from yoloxkd.losses import Loss as Loss
from yoloxkd.losses import Losses as Losses
from yoloxkd.losses import LossName as LossName
from yoloxkd.losses import task_losses as task_losses

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ImageSize = int | tuple[int, int]
"""Size of a network input, px: the side of a square that images are letterboxed into, or (short, long), the sides that an
image is fitted within with its aspect kept; the input is as large as its largest image then."""


def corner_factors(like: Tensor, x: float, y: float) -> Tensor:
    """(4,) x, y, x, y in dtype and on the device of `like`; filled in there, since a copy would wait for the device."""
    factors = like.new_full((4,), x)
    factors[1::2].fill_(y)
    return factors


@dataclass(slots=True)
class Targets:
    """Padded ground truth of a batch. Rows are either real (`mask`), to be ignored (`ignore`), or padding (neither).

    Attributes:
        boxes: (B, G, 4) float32, xyxy px of the network input; padding rows are zero
        labels: (B, G) int64, class index in the data set's name order; 0 on padding rows
        mask: (B, G) bool, True on boxes that are trained on
        ignore: (B, G) bool, True on crowd and ignore regions: neither positive nor background
        content: (B, 4) xyxy px, the part of the input that is image, from its top left corner: a location
            outside is neither positive nor background. None: padding, if there is any, is background like any
            other
        masks: (B, G, H, W) bool, px of the network input, rows as `boxes`; of a row that is all False only
            the box is trained. None: nobody asked for masks
    """

    boxes: Tensor
    labels: Tensor
    mask: Tensor
    ignore: Tensor
    content: Tensor | None = None
    masks: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Targets:
        """The targets with `function` applied to every tensor: some of the images, another device."""
        required = (function(self.boxes), function(self.labels), function(self.mask), function(self.ignore))
        return Targets(*required, *(None if x is None else function(x) for x in (self.content, self.masks)))

    def scaled(self, x: float, y: float) -> Targets:
        """The targets of the same images at `x` times the width and `y` times the height."""
        factor = corner_factors(self.boxes, x, y)
        content = None if self.content is None else self.content * factor
        masks = None if self.masks is None else _scaled_masks(self.masks, x, y)
        return replace(self, boxes=self.boxes * factor, content=content, masks=masks)


def _scaled_masks(masks: Tensor, x: float, y: float) -> Tensor:
    from torch.nn import functional

    size = (round(masks.shape[2] * y), round(masks.shape[3] * x))
    soft = functional.interpolate(masks.flatten(0, 1).unsqueeze(1).float(), size, mode="bilinear")
    scaled: Tensor = soft.squeeze(1).unflatten(0, masks.shape[:2]) > 0.5
    return scaled


@dataclass(slots=True)
class ImageMeta:
    """Where an image of a batch came from and how it was letterboxed.

    A pixel (x, y) of the stored image lies at (x * scale + left, y * scale + top) of the network input. `image_id` is the
    data set's own number of the image; `index`, its position there, is what the program tells images apart by.
    """

    image_id: int
    path: str
    height: int
    width: int
    scale: float = 1.0
    left: float = 0.0
    top: float = 0.0
    index: int = 0


@dataclass(slots=True)
class Batch:
    """What the loader gives, and both student and teacher read.

    Attributes:
        images: (B, 3, H, W) uint8 RGB
        targets: Targets
        content: (B, 4) float32, xyxy px: the part of the input that is image, not padding
        meta: one ImageMeta per image
        place: (first, every): the images are number first, first + every, ... of the step's batch over all
            processes
    """

    images: Tensor
    targets: Targets
    content: Tensor
    meta: list[ImageMeta] = field(default_factory=list)
    place: tuple[int, int] = (0, 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `function` applied to every tensor."""
        images, content = function(self.images), function(self.content)
        return replace(self, images=images, targets=self.targets.map(function), content=content)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        return self.map(lambda x: x.to(device, non_blocking=non_blocking))

    def part(self, number: int, parts: int) -> Batch:
        """Every `parts`-th image from `number` on; with 1 part the batch itself."""
        if parts == 1:
            return self
        part = self.map(lambda x: x[number::parts])
        first, every = self.place
        return replace(part, meta=self.meta[number::parts], place=(first + every * number, every * parts))

    def resized(self, size: int) -> Batch:
        """The batch with images bilinearly resized to (size, size) px and boxes scaled along; itself if it has that size."""
        from torch.nn import functional

        height, width = self.images.shape[-2:]
        if (height, width) == (size, size):
            return self
        # uint8 interpolation does not exist on every device, so resize in float and round back
        images = functional.interpolate(self.images.float(), size=(size, size), mode="bilinear", align_corners=False)
        images = images.round_().clamp_(0, 255).to(self.images.dtype)
        x, y = size / width, size / height
        content = self.content * corner_factors(self.content, x, y)
        return replace(self, images=images, targets=self.targets.scaled(x, y), content=content)

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader when it pins memory."""
        return self.map(lambda x: x.pin_memory())


class Tap(StrEnum):
    """The maps of a detector that a distiller can read: the name of the output's field that holds them."""

    BACKBONE = "backbone_features"
    NECK = "features"
    CLS = "cls_features"
    REG = "reg_features"
    ROI = "roi_features"


class Draw(NamedTuple):
    """What everything drawn at random in a step follows from, so that a resumed run draws the same.

    seed of the run; number of the step, from 0 over the whole run
    place (first, every): the images at hand are number first, first + every, ... of the step's batch over all processes
    """

    seed: int = 0
    number: int = 0
    place: tuple[int, int] = (0, 1)


@dataclass(slots=True)
class Grid:
    """Where a detector's A predictions lie: level after level, row-major inside a level, those of a cell side by side.

    Attributes:
        sizes: L x (h, w) cells
        strides: L strides in px, finest first
        points: (A, 2) x, y px
        point_strides: (A,) px, the stride of each prediction's level
        anchors: (A, 4) px, or None
        per_cell: predictions of a cell
        offset: cell (row i, column j) of stride s lies at ((j + offset) s, (i + offset) s)
        steps: L x (y, x) px from cell to cell where that is not the stride; None: it is
    """

    sizes: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    points: Tensor
    point_strides: Tensor
    anchors: Tensor | None = None
    per_cell: int = 1
    offset: float = 0.5
    steps: tuple[tuple[float, float], ...] | None = None

    def slices(self) -> tuple[slice, ...]:
        """Where each level's predictions are among all."""
        ends = list(accumulate((h * w * self.per_cell for h, w in self.sizes), initial=0))
        return tuple(map(slice, ends[:-1], ends[1:]))

    def by_level(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, A, ...) -> L x (B, h, w, per_cell, ...)"""
        parts = zip(self.slices(), self.sizes, strict=True)
        return tuple(x[:, part].unflatten(1, (h, w, self.per_cell)) for part, (h, w) in parts)

    def of_levels(self, levels: Sequence[int]) -> Grid:
        """The grid of some levels alone."""
        slices = self.slices()

        def concat_levels(x: Tensor) -> Tensor:
            import torch

            return torch.cat([x[slices[i]] for i in levels])

        return replace(
            self,
            sizes=tuple(self.sizes[i] for i in levels),
            strides=tuple(self.strides[i] for i in levels),
            points=concat_levels(self.points),
            point_strides=concat_levels(self.point_strides),
            anchors=None if self.anchors is None else concat_levels(self.anchors),
            steps=None if self.steps is None else tuple(self.steps[i] for i in levels),
        )

    def of_cells(self) -> Grid:
        """The grid of the cells: one location each, whatever is predicted there."""
        if self.per_cell == 1:
            return self
        points, strides = self.points[:: self.per_cell], self.point_strides[:: self.per_cell]
        return replace(self, points=points, point_strides=strides, anchors=None, per_cell=1)


class DetectorOutput(Protocol):
    """All that a distiller of maps may ask of any detector's output; further maps are fields named as `Tap` says.

    Attributes:
        features: L x (B, C, h, w) neck maps
        image_size: (H, W) of the network input
    """

    @property
    def features(self) -> tuple[Tensor, ...]: ...

    @property
    def image_size(self) -> tuple[int, int]: ...


@dataclass(slots=True)
class DenseOutput:
    """Everything a dense detector says about a batch: what losses, distillers and post-processing read.

    Attributes:
        backbone_features: (B, C, h, w) maps of the backbone, finest first
        features: L x (B, C, h, w) neck maps
        cls_features: L x (B, C, h, w) output of the first block of each classification tower
        reg_features: L x (B, C, h, w) the same of the regression tower
        cls_logits: (B, A, K) class logits
        box_raw: (B, A, R) box code as the network gives it
        boxes: (B, A, 4) decoded xyxy px of the network input
        quality: (B, A) objectness or centerness logits, or None
        grid: where the A predictions lie
        image_size: (H, W)
    """

    backbone_features: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    cls_features: tuple[Tensor, ...]
    reg_features: tuple[Tensor, ...]
    cls_logits: Tensor
    box_raw: Tensor
    boxes: Tensor
    quality: Tensor | None
    grid: Grid
    image_size: tuple[int, int]


@dataclass(slots=True)
class RoIStage:
    """What one stage of a two-stage detector says of P regions.

    Attributes:
        roi_features: (B, P, C, s, s) pooled maps
        cls_logits: (B, P, K + 1), background last
        box_raw: (B, P, R) box code; of every class, or of all classes alike
        boxes: (B, P, 4) decoded px, of the class with the largest logit
        regions: (B, P, 4) px, what it was asked about
    """

    roi_features: Tensor
    cls_logits: Tensor
    box_raw: Tensor
    boxes: Tensor
    regions: Tensor


@dataclass(slots=True)
class RoIOutput:
    """Everything a two-stage detector says about a batch.

    Attributes:
        rpn: the proposal network's output, of one class
        proposals: (B, P, 4) px, best first, in as many slots for every image
        valid: (B, P) bool, slots that hold a proposal
        stages: one after the other; the last is what detections are made of
    """

    rpn: DenseOutput
    proposals: Tensor
    valid: Tensor
    stages: tuple[RoIStage, ...]

    @property
    def backbone_features(self) -> tuple[Tensor, ...]:
        return self.rpn.backbone_features

    @property
    def features(self) -> tuple[Tensor, ...]:
        return self.rpn.features

    @property
    def roi_features(self) -> tuple[Tensor, ...]:
        return tuple(stage.roi_features for stage in self.stages)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.rpn.image_size


@runtime_checkable
class Predictor(Protocol):
    """Anything that detects: a PyTorch model with its post-processing, or an exported file in its runtime.

    Attributes:
        names: class names, in label order
        stride: H and W of the input must be multiples of it
        pad_value: RGB value (0..255) of letterbox padding
    """

    names: list[str]
    stride: int
    pad_value: tuple[int, int, int]

    def __call__(self, images: Tensor) -> list[Detections]:
        """images (B, 3, H, W) uint8 RGB -> one Detections per image, boxes in px of the network input."""
        ...
