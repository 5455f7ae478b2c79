"""How many operations a training step needs, and how many a second this machine's convolutions reach at best."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from benchmarks.scenes import detector
from yoloxkd.nn.complexity import complexity


def step_flops(name: str, size: int, images: int) -> float:
    """Operations (two a multiply-add) of forward and backward: the backward pass has two products for each forward one."""
    return 3.0 * images * complexity(detector(name), size).flops


@torch.no_grad()
def convolution_peak(rounds: int = 12) -> float:
    """Operations a second of the best of a 3x3 convolution of 256 channels on maps that stay in the caches."""
    x = torch.randn(4, 256, 28, 28).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    operations = 2 * x.shape[0] * 28 * 28 * 256 * 256 * 9
    best = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        F.conv2d(x, weight, padding=1)
        best = max(best, operations / (time.perf_counter() - started))
    return best
