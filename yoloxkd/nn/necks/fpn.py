"""Feature pyramid network (FPN) of strides 8 to 128."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.nn.blocks import GroupNorm


def double(x: Tensor) -> Tensor:
    """Twice the height and width by repetition."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class FPN(nn.Module):
    """Feature pyramid of strides 8 to 128 (Lin et al. 2017), with two extra levels.

    Maps of strides 8, 16, 32 with `inputs` channels -> five maps of `channels` channels: strides 8, 16, 32 by 1x1
    laterals, addition from coarse to fine and a 3x3 convolution; 64 and 128 by 3x3 convolutions of stride 2, each on the
    level before it. Their sizes are rounded up: 3 cells become 2.

    relu_before_last   the coarsest level reads the one before through a ReLU (FCOS, AutoAssign)
    extra_on_input     the level of stride 64 reads the input of stride 32 (RetinaNet) instead of the level before it
    groups             of a group norm after every convolution, in place of its bias (RepPoints); None: no norm
    Attribute names are those of mmdetection's keys.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        channels: int,
        *,
        relu_before_last: bool,
        extra_on_input: bool = False,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.relu_before_last = relu_before_last
        self.extra_on_input = extra_on_input
        self.lateral_convs = nn.ModuleList(PlainConv(c, channels, 1, groups=groups) for c in inputs)
        extra = inputs[-1] if extra_on_input else channels
        read = [(channels, 1)] * len(inputs) + [(extra, 2), (channels, 2)]
        self.fpn_convs = nn.ModuleList(PlainConv(cin, channels, 3, stride, groups=groups) for cin, stride in read)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        merged = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for fine in range(len(merged) - 2, -1, -1):
            merged[fine] = merged[fine] + double(merged[fine + 1])
        convs = list(self.fpn_convs)
        out = [conv(x) for conv, x in zip(convs, merged, strict=False)]
        out.append(convs[-2](maps[-1] if self.extra_on_input else out[-1]))
        out.append(convs[-1](F.relu(out[-1]) if self.relu_before_last else out[-1]))
        return tuple(out)


class PlainConv(nn.Module):
    """A convolution with bias and nothing after it, under the key `conv`; with a group norm, `gn`, or batch norm, `bn`, instead."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int | None = None, *, batch_norm: bool = False
    ) -> None:
        super().__init__()
        bias = groups is None and not batch_norm
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=bias)
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.gn = nn.Identity() if groups is None else GroupNorm(groups, cout)
        self.bn = nn.BatchNorm2d(cout) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.gn(self.conv(x)))
        return y
