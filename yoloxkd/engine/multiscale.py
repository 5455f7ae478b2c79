"""Multi-scale training: one input size for ten iterations, for every model of the step."""

from __future__ import annotations

import random

INTERVAL = 10  # iterations between size changes, as in YOLOX


def largest_size(*, imgsz: int, steps: tuple[int, int], stride: int) -> int:
    """The largest input size in px that `size_at` gives."""
    return imgsz if steps == (0, 0) else stride * max(2, imgsz // stride + steps[1])


def size_at(iteration: int, *, imgsz: int, steps: tuple[int, int], stride: int, seed: int) -> int:
    """The input size in px at an iteration: imgsz plus `steps[0]` to `steps[1]` strides, at least two strides.

    A pure function of its arguments, so that a resumed run continues with the same sizes.
    """
    if steps == (0, 0):
        return imgsz
    center = imgsz // stride
    draw = random.Random(f"{seed}/{iteration // INTERVAL}")
    return stride * draw.randint(max(2, center + steps[0]), center + steps[1])
