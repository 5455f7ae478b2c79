"""Batch norms of a network that never trains, folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


def fold_norms(model: nn.Module, images: Tensor) -> int:
    """Give convolutions the factor and the shift of the batch norm behind them, in place.

    Which norm follows which convolution is seen in one forward pass. A pair is folded where the norm reads nothing but
    that convolution's output and nothing else reads this. Outputs stay the same but for rounding.

    Args:
        model: In evaluation mode; it must not be trained afterwards.
        images: What it takes, (B, 3, H, W); the values do not matter.

    Returns:
        How many norms were folded.
    """
    trace = _Trace(model)
    try:
        with torch.no_grad(), trace:
            model(images)
    finally:
        trace.remove()
    pairs = trace.pairs()
    for norm, conv in pairs.items():
        _fold(conv, norm)
    for parent in model.modules():
        for name, child in parent._modules.items():
            if isinstance(child, nn.BatchNorm2d) and child in pairs:
                setattr(parent, name, _rest(child))
    return len(pairs)


class _Trace(TorchFunctionMode):
    """Notes in a forward pass who reads what convolutions give."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._outputs: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # with the tensors, whose ids must not be used again
        self._sources: dict[nn.BatchNorm2d, set[nn.Conv2d | None]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._read_elsewhere: set[nn.Conv2d] = set()
        self._in_norm = False
        self._hooks: list[Any] = []
        for module in model.modules():
            if type(module) is nn.Conv2d:  # a subclass may compute with other weights than it holds
                self._hooks.append(module.register_forward_hook(self._after_conv))
            elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and not module.training:
                self._hooks.append(module.register_forward_pre_hook(self._before_norm))
                self._hooks.append(module.register_forward_hook(self._after_norm))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def pairs(self) -> dict[nn.BatchNorm2d, nn.Conv2d]:
        """Norms that can be folded, each with its convolution."""
        pairs = {}
        for norm, convs in self._sources.items():
            conv = next(iter(convs))
            if len(convs) == 1 and conv is not None and self._calls[norm] == self._calls[conv]:
                pairs[norm] = conv
        return {n: c for n, c in pairs.items() if c not in self._read_elsewhere and _rest(n) is not None}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._in_norm:
            read = (self._outputs[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self._outputs)
            self._read_elsewhere |= {conv for _, conv in read}
        return func(*args, **(kwargs or {}))

    def _after_conv(self, conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        self._outputs[id(output)] = output, conv
        self._calls[conv] = self._calls.get(conv, 0) + 1

    def _before_norm(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        source = self._outputs.get(id(inputs[0]))
        self._sources.setdefault(norm, set()).add(source[1] if source else None)
        self._calls[norm] = self._calls.get(norm, 0) + 1
        self._in_norm = True

    def _after_norm(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._in_norm = False


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        shift = -norm.running_mean.double()
        if conv.bias is not None:
            shift = shift + conv.bias.double()
        if norm.affine:
            scale = scale * norm.weight.double()
        bias = shift * scale
        if norm.affine:
            bias = bias + norm.bias.double()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)


def _rest(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What a norm does behind normalization; None: unknown."""
    from timm.layers import BatchNormAct2d

    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if isinstance(norm, BatchNormAct2d):
        return nn.Sequential(norm.drop, norm.act)
    return None
