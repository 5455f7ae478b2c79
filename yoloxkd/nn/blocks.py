"""Convolution blocks of YOLOX, under the official checkpoints' keys, and a group norm for maps of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-3
BN_MOMENTUM = 0.03


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm, SiLU: (B, cin, h, w) -> (B, cout, h/stride, w/stride)."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding=(kernel - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=BN_EPS, momentum=BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        # in place only where nothing is kept for backward: autograd would copy y first
        return F.silu(y, inplace=not y.requires_grad)


class SeparableBlock(nn.Module):
    """A depthwise ConvBlock followed by a 1x1 ConvBlock; the nano network's stand-in for a full convolution."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = ConvBlock(cin, cin, kernel, stride, groups=cin)
        self.pconv = ConvBlock(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pconv(self.dconv(x))
        return y


def spatial_block(cin: int, cout: int, kernel: int, stride: int = 1, *, depthwise: bool) -> nn.Module:
    """A ConvBlock, or a SeparableBlock in depthwise networks."""
    return SeparableBlock(cin, cout, kernel, stride) if depthwise else ConvBlock(cin, cout, kernel, stride)


class Bottleneck(nn.Module):
    """1x1 then 3x3 block at constant width, with an optional residual sum."""

    def __init__(self, channels: int, *, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = ConvBlock(channels, channels, 1)
        self.conv2 = spatial_block(channels, channels, 3, depthwise=depthwise)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return x + y if self.shortcut else y


class CSPLayer(nn.Module):
    """Cross-stage partial layer: half the channels pass `blocks` bottlenecks, the other half go around them."""

    def __init__(self, cin: int, cout: int, blocks: int, *, shortcut: bool = True, depthwise: bool) -> None:
        super().__init__()
        hidden = cout // 2
        self.conv1 = ConvBlock(cin, hidden, 1)
        self.conv2 = ConvBlock(cin, hidden, 1)
        self.conv3 = ConvBlock(2 * hidden, cout, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut=shortcut, depthwise=depthwise) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(torch.cat((self.m(self.conv1(x)), self.conv2(x)), dim=1))
        return y


class SPPBottleneck(nn.Module):
    """Spatial pyramid pooling: the map beside its maxima over windows of 5, 9 and 13 cells."""

    def __init__(self, cin: int, cout: int, windows: tuple[int, ...] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = cin // 2
        self.conv1 = ConvBlock(cin, hidden, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(k, stride=1, padding=k // 2) for k in windows)
        self.conv2 = ConvBlock(hidden * (len(windows) + 1), cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        y: Tensor = self.conv2(torch.cat([x, *(pool(x) for pool in self.m)], dim=1))
        return y


class Focus(nn.Module):
    """The stem: every 2x2 patch of pixels becomes 4 times the channels, then a 3x3 block. Halves height and width."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = ConvBlock(4 * cin, cout, 3)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[..., ::2, :], x[..., 1::2, :]
        patches = (even[..., ::2], odd[..., ::2], even[..., 1::2], odd[..., 1::2])
        y: Tensor = self.conv(torch.cat(patches, dim=1))
        return y


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that also takes a group of a single value, as one channel of a 1x1 map is; it becomes the bias."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
