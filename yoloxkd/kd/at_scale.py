"""A teacher that looks at the batch at another size than the student."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from yoloxkd.nn.detector import DenseDetector
from yoloxkd.types import DenseOutput, Losses, Targets


class AtScale(DenseDetector):
    """A detector that sees its input enlarged (or reduced) by `scale`, rounded to the sizes that it takes.

    What it says is in px of the input it was given: boxes, points and image size. Its maps are those of the size it saw,
    and its levels keep the strides they have there, by which they are paired: a teacher at scale 2 has four cells where
    the student has one.
    """

    def __init__(self, inner: DenseDetector, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale
        self.levels, self.names = inner.levels, list(inner.names)
        self.input, self.taps = inner.input, inner.taps

    @property
    def size_multiple(self) -> int:
        return self.inner.size_multiple

    def seen_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width px of what the detector sees of an input of this size."""
        step = self.inner.size_multiple
        return max(step, round(height * self.scale / step) * step), max(step, round(width * self.scale / step) * step)

    def forward(self, images: Tensor) -> DenseOutput:
        height, width = images.shape[-2:]
        size = self.seen_size(height, width)
        if size != (height, width):
            smaller = size[0] < height
            images = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=smaller)
        out: DenseOutput = self.inner(images)
        back = out.points.new_tensor([width / size[1], height / size[0]])
        boxes = out.boxes * back.to(out.boxes.dtype).repeat(2)
        return replace(out, boxes=boxes, points=out.points * back, image_size=(height, width))

    def dense(self, x: Tensor) -> DenseOutput:
        return self.inner.dense(x)

    def losses(self, out: DenseOutput, targets: Targets) -> Losses:
        return self.inner.losses(out, targets)

    def class_probability(self, out: DenseOutput) -> Tensor:
        return self.inner.class_probability(out)

    def scores(self, out: DenseOutput) -> Tensor:
        return self.inner.scores(out)


def plain(detector: DenseDetector) -> DenseDetector:
    """The detector itself, without its scale."""
    return detector.inner if isinstance(detector, AtScale) else detector
