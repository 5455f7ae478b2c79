"""Features of regions: RoIAlign on the level of a feature pyramid that suits a region's size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from yoloxkd.nn.two_stage.roi_align_rows import roi_align_rows
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

    On a CPU, which never waits, every level is asked for its own regions. Elsewhere, and in an exported graph, every level
    is asked for all of them, those of other levels lying far outside it, where there is nothing to read: so the shapes do
    not depend on the data, and nothing waits for the device.

    Args:
        maps: L x (B, C, h, w); strides: L in px
        boxes: (B, P, 4) px
        size: cells of a side
        sampling: points a cell and direction; 0: as many as the cell has pixels of the map, rounded up
        aligned: pixel centers lie half a cell from the map's corner; False: at the corner (torchvision's detectors)
    Returns:
        (B, P, C, size, size)
    """
    images, count = boxes.shape[:2]
    boxes = full_precision(boxes.detach())
    image = torch.arange(images, device=boxes.device, dtype=boxes.dtype).repeat_interleave(count)
    rois = torch.cat((image.unsqueeze(-1), boxes.flatten(0, 1)), 1)
    level_of = roi_levels(boxes, len(maps)).flatten()
    align = partial(_aligned, size=size, sampling=sampling, aligned=aligned)
    levels = list(zip(maps, strides, strict=True))
    far = torch.cat((rois[:, :1], torch.full_like(rois[:, 1:], _NOWHERE)), 1)
    if len(maps) == 1:
        pooled = align(maps[0], strides[0], rois)
    elif boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        no_box = level_of.isnan()  # of a training that diverges, whose loss is refused
        level_of, rois = level_of.nan_to_num(0), torch.where(no_box.unsqueeze(-1), far, rois)
        rows = [(level_of == level).nonzero().squeeze(1) for level in range(len(maps))]
        parts = [align(x, stride, rois[some]) for (x, stride), some in zip(levels, rows, strict=True)]
        pooled = torch.cat(parts).index_select(0, torch.cat(rows).argsort())
    else:
        inside = [(level_of == level).unsqueeze(-1) for level in range(len(maps))]
        parts = [align(x, stride, torch.where(at, rois, far)) for (x, stride), at in zip(levels, inside, strict=True)]
        pooled = sum(parts[1:], start=parts[0])
    return pooled.view(images, count, *pooled.shape[1:])


def _aligned(x: Tensor, stride: int, rois: Tensor, *, size: int, sampling: int, aligned: bool) -> Tensor:
    """RoIAlign of regions (N, 5), image and px, on one level's map."""
    x = full_precision(x)
    form = rois.to(x.dtype), size, 1 / stride, sampling, aligned
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return roi_align_rows(x, *form)
    from torchvision.ops import roi_align

    pooled: Tensor = roi_align(x, *form)
    return pooled
