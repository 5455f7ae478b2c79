"""Multi-scale training: one input size for ten iterations, shared by student and teacher."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional

from yoloxkd.types import Batch, Targets

INTERVAL = 10  # iterations between size changes, as in YOLOX


def size_at(iteration: int, *, imgsz: int, steps: tuple[int, int], stride: int, seed: int) -> int:
    """The input size in px at an iteration: imgsz plus `steps[0]` to `steps[1]` strides, at least two strides.

    A pure function of its arguments, so that a resumed run continues with the same sizes.
    """
    if steps == (0, 0):
        return imgsz
    center = imgsz // stride
    draw = random.Random(f"{seed}/{iteration // INTERVAL}")
    return stride * draw.randint(max(2, center + steps[0]), center + steps[1])


def resize_batch(batch: Batch, size: int) -> Batch:
    """The batch with images bilinearly resized to (size, size) and boxes scaled along; unchanged if it has that size."""
    height, width = batch.images.shape[-2:]
    if (height, width) == (size, size):
        return batch
    # uint8 interpolation does not exist on every device, so resize in float and round back
    images = functional.interpolate(batch.images.float(), size=(size, size), mode="bilinear", align_corners=False)
    factor = torch.tensor([size / width, size / height] * 2, device=batch.images.device)
    targets = batch.targets
    content = None if targets.content is None else targets.content * factor
    scaled = Targets(targets.boxes * factor, targets.labels, targets.mask, targets.ignore, content)
    return Batch(_round(images), scaled, batch.content * factor, batch.meta, batch.place)


def _round(images: Tensor) -> Tensor:
    return images.round_().clamp_(0, 255).to(torch.uint8)
