"""Edge form of an exported network: equal arithmetic that every runtime has, and that is faster.

A Focus stem is one 6x6 convolution, and the swap of RGB to BGR lies in the first convolution's weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from yoloxkd.nn.blocks import Focus
from yoloxkd.nn.detector import Detector

INPUT_SCALE = 256.0
"""Of `scaled_input`; a power of two, so that nothing is rounded."""


class OneConvolution(nn.Module):
    """A Focus after `edge_form`, with its layer's name: the block alone, whose convolution does the gathering."""

    def __init__(self, focus: Focus) -> None:
        super().__init__()
        self.conv = focus.conv

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def edge_form(detector: Detector[Any, Any]) -> Detector[Any, Any]:
    """Rewrite a detector whose batch norms are folded, in place; it gives the same outputs.

    A first convolution of a kind not known here, such as a quantized one, stays as it is, and so does the swap of channels
    where anything else reads the input.
    """
    for name, module in list(detector.named_modules()):
        if isinstance(module, Focus) and _plain(module.conv.conv):
            module.conv.conv = _gathering(module.conv.conv)
            parent, _, attribute = name.rpartition(".")
            setattr(detector.get_submodule(parent), attribute, OneConvolution(module))
    convention = detector.spec.input
    first = _first(detector) if convention.bgr else None
    if first is not None:
        first.weight = nn.Parameter(first.weight.flip(1), requires_grad=False)
        _set_input(detector, bgr=False, mean=convention.mean[::-1], std=convention.std[::-1])
    return detector


def scaled_input(detector: Detector[Any, Any]) -> Detector[Any, Any]:
    """Give the network inputs of 0 to 1 instead of 0 to 255 and its first convolution weights that much larger, in place.

    For fp16 files: weights for pixels of 0..255 are so small that some runtimes flush them to zero. A network with a
    normalization of its own stays as it is.
    """
    convention = detector.spec.input
    first = _first(detector) if convention.std == (1.0, 1.0, 1.0) and not any(convention.mean) else None
    if first is not None:
        first.weight = nn.Parameter(first.weight * INPUT_SCALE, requires_grad=False)
        _set_input(detector, std=(INPUT_SCALE,) * 3)
    return detector


def _set_input(detector: Detector[Any, Any], **values: Any) -> None:
    detector.spec = replace(detector.spec, input=replace(detector.spec.input, **values))


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.groups == 1


def _gathering(conv: nn.Conv2d) -> nn.Conv2d:
    """The 6x6 convolution of stride 2 that equals gathering 2x2 patches and then a 3x3 convolution."""
    whole = nn.Conv2d(conv.in_channels // 4, conv.out_channels, 6, 2, 2, bias=conv.bias is not None)
    weight = torch.empty_like(whole.weight)
    for part, (row, column) in zip(conv.weight.chunk(4, dim=1), ((0, 0), (1, 0), (0, 1), (1, 1)), strict=True):
        weight[:, :, row::2, column::2] = part
    whole.weight, whole.bias = nn.Parameter(weight, requires_grad=False), conv.bias
    return whole


def _first(detector: Detector[Any, Any]) -> nn.Conv2d | None:
    """The convolution that alone reads the normalized input."""
    inputs: list[Tensor] = []
    readers: list[nn.Module] = []

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if module is detector or not arguments or not isinstance(arguments[0], Tensor):
            return
        if arguments[0].shape[1:2] == (3,) and not list(module.children()):
            inputs.append(arguments[0])
            readers.append(module)

    hooks = [module.register_forward_pre_hook(before) for module in detector.modules()]
    side = 2 * detector.size_multiple
    image = torch.full((1, 3, side, side), 7.0)
    with torch.no_grad():
        detector(image)
        expected = detector.normalize(image)
    for hook in hooks:
        hook.remove()
    of_input = [r for r, x in zip(readers, inputs, strict=True) if x.shape == expected.shape and x.equal(expected)]
    if len(of_input) == 1 and isinstance(of_input[0], nn.Conv2d) and _plain(of_input[0]):
        return of_input[0]
    return None
