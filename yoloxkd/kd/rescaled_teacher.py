"""A teacher that sees the batch at another size than the student."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from yoloxkd.nn.detector import Detector
from yoloxkd.nn.solo.solo import SOLOOutput
from yoloxkd.types import Draw, Losses, RoIOutput, Targets, corner_factors


class RescaledTeacher(Detector[Any, Any]):
    """A detector that sees its input enlarged (or reduced) by `scale`, rounded to the sizes that it takes.

    What it says is in px of the input it was given: boxes, grid and image size. Its maps are those of the size it saw,
    and its levels keep the strides they have there, by which they are paired: a teacher at scale 2 has four cells where
    the student has one.
    """

    def __init__(self, inner: Detector[Any, Any], scale: float) -> None:
        super().__init__(inner.cfg, inner.names)
        self.inner, self.scale, self.spec = inner, scale, inner.spec

    @property
    def size_multiple(self) -> int:
        return self.inner.size_multiple

    def inner_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width px of what the detector sees of an input of this size."""
        step = self.inner.size_multiple
        return max(step, round(height * self.scale / step) * step), max(step, round(width * self.scale / step) * step)

    def forward(self, images: Tensor) -> Any:
        height, width = images.shape[-2:]
        size = self.inner_size(height, width)
        if size != (height, width):
            smaller = size[0] < height
            images = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=smaller)
        return brought_back(self.inner(images), width / size[1], height / size[0], (height, width))

    def network(self, x: Tensor) -> Any:
        return self.inner.network(x)

    def assign(self, out: Any, targets: Targets, draw: Draw = Draw()) -> Any:
        return self.inner.assign(out, targets, draw)

    def losses(self, out: Any, targets: Targets, match: Any) -> Losses:
        return self.inner.losses(out, targets, match)

    def candidates(self, out: Any) -> tuple[Tensor, Tensor]:
        return self.inner.candidates(out)

    def level_sizes(self, out: Any) -> tuple[int, ...]:
        return self.inner.level_sizes(out)

    def class_probability(self, out: Any) -> Tensor:
        return self.inner.class_probability(out)


def brought_back(out: Any, x: float, y: float, image_size: tuple[int, int]) -> Any:
    """An output with every place in it at `x` and `y` times its coordinates, those of an input of image_size (H, W) px."""
    if isinstance(out, RoIOutput):
        factor = corner_factors(out.proposals, x, y)
        stages = tuple(replace(s, boxes=s.boxes * factor, regions=s.regions * factor) for s in out.stages)
        rpn = brought_back(out.rpn, x, y, image_size)
        return replace(out, rpn=rpn, proposals=out.proposals * factor, stages=stages)
    factor = corner_factors(out.grid.points, x, y)
    anchors = None if out.grid.anchors is None else out.grid.anchors * factor
    grid = replace(out.grid, points=out.grid.points * factor[:2], anchors=anchors)
    if isinstance(out, SOLOOutput):  # its boxes follow from its masks
        return replace(out, grid=grid, image_size=image_size)
    return replace(out, boxes=out.boxes * factor.to(out.boxes.dtype), grid=grid, image_size=image_size)


def unwrapped(detector: Detector[Any, Any]) -> Detector[Any, Any]:
    """The detector itself, without its scale."""
    return detector.inner if isinstance(detector, RescaledTeacher) else detector
