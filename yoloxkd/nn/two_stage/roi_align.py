"""Features of regions: RoIAlign on the level of a feature pyramid that suits a region's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yoloxkd.ops.boxes import area
from yoloxkd.ops.losses import full_precision

CANONICAL = 56.0
"""px, side of the square that belongs to the finest level's upper bound (Lin et al. 2017, eq. 1: 224 at level 4)."""
_NOWHERE = -1e5
"""px, a place so far from any map that RoIAlign reads zeros there."""


def roi_levels(boxes: Tensor, levels: int) -> Tensor:
    """Pyramid level of each region, 0 the finest (Lin et al. 2017, eq. 1): (..., 4) px -> (...) float, whole numbers."""
    return (area(boxes).sqrt() / CANONICAL + 1e-6).log2().floor().clamp(0, levels - 1)


def roi_features(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    size: int,
    *,
    sampling: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoIAlign (He et al. 2017) of every region on its own level.

    Every level is asked for all regions, those of other levels lying far outside it, where there is nothing to read: so
    the shapes do not depend on the data, and nothing waits for the device.

    Args:
        maps: L x (B, C, h, w); strides: L in px
        boxes: (B, P, 4) px
        size: cells of a side
        sampling: points a cell and direction; 0: as many as the cell has pixels of the map, rounded up
        aligned: pixel centers lie half a cell from the map's corner; False: at the corner (torchvision's detectors)
    Returns:
        (B, P, C, size, size)
    """
    from torchvision.ops import roi_align

    images, count = boxes.shape[:2]
    boxes = full_precision(boxes.detach())
    image = torch.arange(images, device=boxes.device, dtype=boxes.dtype).repeat_interleave(count)
    level_of = roi_levels(boxes, len(maps)).flatten()
    pooled: Tensor | None = None
    for level, (x, stride) in enumerate(zip(maps, strides, strict=True)):
        level_boxes = boxes.flatten(0, 1)
        if len(maps) > 1:
            level_boxes = torch.where((level_of == level).unsqueeze(-1), level_boxes, _NOWHERE)
        x = full_precision(x)
        rois = torch.cat((image.unsqueeze(-1), level_boxes), 1).to(x.dtype)
        part: Tensor = roi_align(x, rois, size, 1 / stride, sampling, aligned)
        pooled = part if pooled is None else pooled + part
    assert pooled is not None
    return pooled.view(images, count, *pooled.shape[1:])
