"""Convolutions of the heads of two-stage detectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ConvReLU(nn.Module):
    """3x3 convolution, under the key `conv`, and ReLU; with `norm` a batch norm, `bn`, between them for the bias."""

    def __init__(self, cin: int, cout: int, *, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1, bias=not norm)
        self.bn = nn.BatchNorm2d(cout) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def conv_blocks(channels: int, hidden: int, count: int, *, norm: bool = False) -> nn.ModuleList:
    """`count` blocks one after the other: `channels` -> `hidden`."""
    return nn.ModuleList(ConvReLU(channels if i == 0 else hidden, hidden, norm=norm) for i in range(count))
