"""Path-aggregation network (PAFPN) of YOLOX."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from yoloxkd.nn.backbones.csp_darknet import CSPDarknet
from yoloxkd.nn.blocks import ConvBlock, CSPLayer, spatial_block
from yoloxkd.nn.necks.fpn import double


class PAFPN(nn.Module):
    """YOLOX's path-aggregation pyramid with its backbone inside: (B, 3, H, W) -> maps of strides 8, 16, 32.

    Coarse maps go up to the fine ones, then fine maps come down again; channels stay those of the backbone.
    The attribute names, and the backbone's place inside, are those of the official checkpoints' keys.
    """

    def __init__(self, depth: float, width: float, depthwise: bool) -> None:
        super().__init__()
        self.backbone = CSPDarknet(depth, width, depthwise)
        self.channels = self.backbone.channels
        fine, middle, coarse = self.channels
        blocks = round(3 * depth)

        def csp(cin: int, cout: int) -> CSPLayer:
            return CSPLayer(cin, cout, blocks, shortcut=False, depthwise=depthwise)

        def down(channels: int) -> nn.Module:
            return spatial_block(channels, channels, 3, stride=2, depthwise=depthwise)

        self.lateral_conv0 = ConvBlock(coarse, middle, 1)
        self.C3_p4 = csp(2 * middle, middle)
        self.reduce_conv1 = ConvBlock(middle, fine, 1)
        self.C3_p3 = csp(2 * fine, fine)
        self.bu_conv2 = down(fine)
        self.C3_n3 = csp(2 * fine, middle)
        self.bu_conv1 = down(middle)
        self.C3_n4 = csp(2 * middle, coarse)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.merge(self.backbone(x))

    def merge(self, maps: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The neck on the backbone's maps."""
        fine, middle, coarse = maps
        top = self.lateral_conv0(coarse)
        center = self.reduce_conv1(self.C3_p4(torch.cat((double(top), middle), dim=1)))
        out_fine = self.C3_p3(torch.cat((double(center), fine), dim=1))
        out_middle = self.C3_n3(torch.cat((self.bu_conv2(out_fine), center), dim=1))
        out_coarse = self.C3_n4(torch.cat((self.bu_conv1(out_middle), top), dim=1))
        return out_fine, out_middle, out_coarse
