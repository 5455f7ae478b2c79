"""Inputs of the benchmarks: random, reproducible, of the shapes that training has."""

from __future__ import annotations

import torch
from torch import Tensor

from yoloxkd.assembly.models import build_detector
from yoloxkd.nn.coco_names import COCO_NAMES
from yoloxkd.nn.dense.dense_detector import DenseDetector
from yoloxkd.nn.dense.yolox import decode
from yoloxkd.ops.points import grid_of
from yoloxkd.types import Batch, DenseOutput, Targets

LEVELS = (8, 16, 32)
CLASSES = len(COCO_NAMES)


def targets_of(images: int, boxes: int, size: int, seed: int = 0, classes: int = CLASSES) -> Targets:
    """Boxes of 4 % to 60 % of the side, anywhere inside."""
    g = torch.Generator().manual_seed(seed)
    side = size * (0.04 + 0.56 * torch.rand(images, boxes, 2, generator=g) ** 2)
    low = torch.rand(images, boxes, 2, generator=g) * (size - side)
    labels = torch.randint(0, classes, (images, boxes), generator=g)
    mask = torch.ones(images, boxes, dtype=torch.bool)
    return Targets(torch.cat([low, low + side], -1), labels, mask, torch.zeros_like(mask))


def batch_of(images: int, boxes: int, size: int, seed: int = 0, classes: int = CLASSES) -> Batch:
    """Noise of `size` px with boxes."""
    g = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (images, 3, size, size), generator=g, dtype=torch.uint8)
    content = torch.tensor([0.0, 0.0, size, size]).repeat(images, 1)
    return Batch(pictures, targets_of(images, boxes, size, seed, classes), content)


def dense_output(images: int, size: int, seed: int = 0, channels: int = 0, classes: int = CLASSES) -> DenseOutput:
    """Predictions around their cells, of a box a few strides wide; with maps of `channels` channels when asked for."""
    g = torch.Generator().manual_seed(seed)
    sizes = tuple((size // s, size // s) for s in LEVELS)
    grid = grid_of(sizes, LEVELS, torch.device("cpu"))
    cells = len(grid.points)
    raw = torch.randn(images, cells, 4, generator=g) * 0.6 + torch.tensor([0.3, 0.3, 0.9, 0.9])

    def maps() -> tuple[Tensor, ...]:
        return tuple(torch.randn(images, channels, *s, generator=g) for s in sizes) if channels else ()

    return DenseOutput(
        backbone_features=(),
        features=maps(),
        cls_features=maps(),
        reg_features=maps(),
        cls_logits=torch.randn(images, cells, classes, generator=g) * 2 - 3,
        box_raw=raw,
        boxes=decode(raw, grid.points, grid.point_strides),
        quality=torch.randn(images, cells, generator=g) * 2 - 2,
        grid=grid,
        image_size=(size, size),
    )


def detector(name: str, seed: int = 0, **keys: object) -> DenseDetector:
    """An untrained detector of COCO's classes; keys of its Config may be changed."""
    torch.manual_seed(seed)
    return build_detector({"name": name, **keys}, COCO_NAMES)
