"""Deformable convolution against torchvision's operator, value and gradients, and where it looks straight ahead."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import deform_conv2d

from yoloxkd.nn.deform import SelfOffsetConv, by_sampling


@pytest.mark.parametrize(("groups", "stride", "bias"), [(1, 1, False), (4, 2, True), (8, 1, True)])
def test_it_is_torchvisions(groups: int, stride: int, bias: bool) -> None:
    """Offsets far beyond the map, and onto its border, included."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 7, 10, dtype=torch.float64, requires_grad=True)
    conv = SelfOffsetConv(8, 16, 3, stride, groups, bias=bias).double()
    offset = (torch.randn(2, 18, -(-7 // stride), -(-10 // stride), dtype=torch.float64) * 3).requires_grad_()
    inputs = [x, offset, *conv.parameters(recurse=False)]
    ours = by_sampling(x, offset, conv.weight, conv.bias, stride)
    theirs = deform_conv2d(x, offset, conv.weight, conv.bias, stride, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, towards), torch.autograd.grad(theirs, inputs, towards), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_new_one_looks_straight() -> None:
    torch.manual_seed(0)
    conv, x = SelfOffsetConv(4, 6, 3, 2, bias=True), torch.randn(1, 4, 9, 8)
    plain = torch.nn.functional.conv2d(x, conv.weight, conv.bias, 2, 1)
    torch.testing.assert_close(conv(x), plain, rtol=1e-4, atol=1e-5)
    torch.nn.init.normal_(conv.conv_offset.weight)
    assert not torch.allclose(conv(x), plain, atol=1e-2)


def test_half_precision_around_it_leaves_it_in_float32() -> None:
    torch.manual_seed(0)
    conv, x = SelfOffsetConv(4, 6, 3, bias=False), torch.randn(1, 4, 5, 5)
    expected = conv(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(conv(x), expected)
