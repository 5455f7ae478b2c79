"""CSPDarknet, the backbone of YOLOX."""

from __future__ import annotations

from torch import Tensor, nn

from yoloxkd.nn.blocks import CSPLayer, Focus, SPPBottleneck, spatial_block


class CSPDarknet(nn.Module):
    """YOLOX's backbone: (B, 3, H, W) -> maps of strides 8, 16, 32.

    channels  the channels of the three maps, finest first: 256, 512, 1024 times `width`
    Source: the layout of Megvii's YOLOX (Ge et al. 2021), whose checkpoint keys the attribute names follow.
    """

    def __init__(self, depth: float, width: float, depthwise: bool) -> None:
        super().__init__()
        base = int(width * 64)
        blocks = max(round(depth * 3), 1)
        self.channels = (base * 4, base * 8, base * 16)

        def down(cin: int) -> nn.Module:
            return spatial_block(cin, 2 * cin, 3, stride=2, depthwise=depthwise)

        def csp(channels: int, n: int, shortcut: bool = True) -> CSPLayer:
            return CSPLayer(channels, channels, n, shortcut=shortcut, depthwise=depthwise)

        self.stem = Focus(3, base)
        self.dark2 = nn.Sequential(down(base), csp(base * 2, blocks))
        self.dark3 = nn.Sequential(down(base * 2), csp(base * 4, blocks * 3))
        self.dark4 = nn.Sequential(down(base * 4), csp(base * 8, blocks * 3))
        self.dark5 = nn.Sequential(
            down(base * 8), SPPBottleneck(base * 16, base * 16), csp(base * 16, blocks, shortcut=False)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.dark3(self.dark2(self.stem(x)))
        middle = self.dark4(fine)
        return fine, middle, self.dark5(middle)
