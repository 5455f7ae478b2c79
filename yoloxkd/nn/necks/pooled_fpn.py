"""The feature pyramid of two-stage detectors and SOLO: strides 4 to 32, and 64 by taking every second cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.nn.necks.fpn import PlainConv


class PooledFPN(nn.Module):
    """Feature pyramid (Lin et al. 2017): laterals, addition from coarse to fine, a 3x3 convolution a level.

    Maps with `inputs` channels -> as many maps of `channels` channels; norm: a batch norm behind every convolution.
    Attribute names are those of mmdetection's keys.
    """

    def __init__(self, inputs: Sequence[int], channels: int, *, norm: bool = False) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(PlainConv(c, channels, 1, batch_norm=norm) for c in inputs)
        self.fpn_convs = nn.ModuleList(PlainConv(channels, channels, 3, batch_norm=norm) for _ in inputs)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for fine in range(len(merged) - 2, -1, -1):
            size = merged[fine].shape[-2:]
            merged[fine] = merged[fine] + F.interpolate(merged[fine + 1], size=size, mode="nearest")
        return tuple(conv(x) for conv, x in zip(self.fpn_convs, merged, strict=True))


def with_pooled(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The maps and one more of twice the coarsest's stride: every second of its cells."""
    return (*maps, F.max_pool2d(maps[-1], 1, 2))
