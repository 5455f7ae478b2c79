"""MobileNetV3 with two maps of stride 32, as torchvision's detectors read it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from yoloxkd.errors import UserError
from yoloxkd.nn.backbones.timm_backbone import TimmBackbone


class CoarseMobileNet(TimmBackbone):
    """A timm MobileNetV3: (B, 3, H, W) -> its map behind the block that halves the size last, and its last map.

    Both have stride 32. Keys as `TimmBackbone`. UserError: the network is another.
    """

    def __init__(self, name: str, **keys: Any) -> None:
        if not name.startswith("mobilenetv3"):
            raise UserError(f"student.coarse is for MobileNetV3, and the backbone is '{name}'; use false")
        super().__init__(name, strides=(32,), **keys)
        self.channels = (int(self.body.blocks[-2][0].conv_pwl.out_channels), *self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.body.act1(self.body.bn1(self.body.conv_stem(x)))
        for stage in self.body.blocks[:-2]:
            x = stage(x)
        first, *others = self.body.blocks[-2]
        maps = [first(x)]
        x = maps[0]
        for block in (*others, self.body.blocks[-1]):
            x = block(x)
        return [*maps, x]
