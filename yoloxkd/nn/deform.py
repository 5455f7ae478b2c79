"""Deformable convolution (Dai et al. 2017): a convolution whose every kernel cell looks beside its place, by an offset."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.ops.losses import full_precision, without_autocast


class DeformableConv(nn.Conv2d):
    """A square convolution that is told where to look; its weights are laid out like a plain convolution's.

    x (B, cin, h, w), offset (B, 2 k k, h', w') cells: y, x of each kernel cell, row by row -> (B, cout, h', w'). What lies
    outside the map is zero, and the values between two cells are interpolated. Computed in float32 at least.
    """

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:  # type: ignore[override]
        with without_autocast(x):
            weight, bias = full_precision(self.weight), None if self.bias is None else full_precision(self.bias)
            x, offset = full_precision(x), full_precision(offset)
            stride, padding = self.stride[0], int(self.padding[0])
            if x.device.type != "cuda" or torch.compiler.is_exporting():
                return by_sampling(x, offset, weight, bias, stride, padding)
            # Its kernel keeps no samples for backward; on a CPU it is three to five times slower than sampling.
            from torchvision.ops import deform_conv2d

            y: Tensor = deform_conv2d(x, offset, weight, bias, stride, padding)
            return y


class SelfOffsetConv(DeformableConv):
    """A deformable convolution that predicts its offsets from its own input; they start at zero.

    The attribute names are those of mmdetection's keys.
    """

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, *, bias: bool) -> None:
        super().__init__(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.conv_offset = nn.Conv2d(cin, 2 * kernel * kernel, kernel, stride, kernel // 2)
        self.look_straight()

    def look_straight(self) -> None:
        """Set every offset to zero, whatever the input."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.conv_offset(x))


def make_deformable(body: nn.Module, stages: int, name: str) -> None:
    """Make the 3x3 convolutions of a timm ResNet's last stages deformable, with their weights. UserError: it is no ResNet."""
    blocks = [block for n in range(5 - stages, 5) for block in getattr(body, f"layer{n}", ())]
    if not blocks or not all(isinstance(getattr(block, "conv2", None), nn.Conv2d) for block in blocks):
        raise UserError(f"student.deformable_stages is for ResNets and ResNeXts, and '{name}' is none; use 0")
    for block in blocks:
        plain = block.conv2
        conv = SelfOffsetConv(
            plain.in_channels, plain.out_channels, plain.kernel_size[0], plain.stride[0], plain.groups,
            bias=plain.bias is not None,
        )  # fmt: skip
        conv.weight, conv.bias = plain.weight, plain.bias
        block.conv2 = conv


def by_sampling(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 1
) -> Tensor:
    """A deformable convolution of operators that every runtime has: the samples of all kernel cells, then a 1x1 convolution.

    x (B, cin, H, W), offset (B, 2 k k, h, w) cells, weight (cout, cin / groups, k, k), or as `of_samples`, -> (B, cout, h, w). Exported graphs
    compute it this way: ONNX has an operator of its own from opset 19 only, and not every runtime has that.
    """
    cells, weight = samples(x, offset, stride, padding), of_samples(weight)
    return F.conv2d(cells, weight, bias, groups=cells.shape[1] // weight.shape[1])


def samples(x: Tensor, offset: Tensor, stride: int, padding: int) -> Tensor:
    """What every kernel cell sees: x (B, cin, H, W), offset (B, 2 k k, h, w) cells -> (B, cin k k, h, w)."""
    kernel = math.isqrt(offset.shape[1] // 2)
    height, width = offset.shape[2:]
    shift = offset.unflatten(1, (kernel, kernel, 2))  # (B, k, k, 2, h, w)
    of_kernel = torch.arange(kernel, device=x.device, dtype=x.dtype) - padding
    row = torch.arange(height, device=x.device, dtype=x.dtype) * stride
    column = torch.arange(width, device=x.device, dtype=x.dtype) * stride
    y = shift[:, :, :, 0] + of_kernel[:, None, None, None] + row[:, None]
    x_ = shift[:, :, :, 1] + of_kernel[:, None, None] + column
    # grid_sample's frame without aligned corners: cell i of n has its center at (2 i + 1) / n - 1.
    places = torch.stack(((2 * x_ + 1) / x.shape[3] - 1, (2 * y + 1) / x.shape[2] - 1), dim=-1)
    sampled = F.grid_sample(x, places.flatten(1, 3), mode="bilinear", padding_mode="zeros", align_corners=False)
    cells: Tensor = sampled.unflatten(2, (kernel * kernel, height)).flatten(1, 2)
    return cells


def of_samples(weight: Tensor) -> Tensor:
    """The weights (cout, cin k k / groups, 1, 1) of a convolution over the samples, from (cout, cin / groups, k, k) or as they are."""
    return weight if weight.shape[-1] == 1 else weight.flatten(1)[..., None, None]
