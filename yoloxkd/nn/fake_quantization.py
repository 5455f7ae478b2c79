"""Fake quantization of convolutions: int8 weights and uint8 activations, rounded in float32, with gradients.

Rounding passes gradients straight through, and gives none to what lies outside the range (Jacob et al. 2018, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.errors import UserError
from yoloxkd.nn.conv_followers import norms_after, readers_of, replace_modules, rest_of
from yoloxkd.nn.deform import DeformableConv, SelfOffsetConv, of_samples, samples
from yoloxkd.nn.detector import Detector
from yoloxkd.ops.losses import full_precision, without_autocast

CODES = 255
"""Steps of an activation's scale: its codes are 0 to 255."""
WEIGHT_CODES = (-128, 127)
LEAST_SCALE = 1e-12
MOST_BIAS = 2.0**30
SILU_FLOOR = -6.0
"""SiLU is nearly 0 below; as `export.silu_floor` (docs/quantization.md)."""
_LIMITS = {
    "silu": (SILU_FLOOR, torch.inf),
    "relu": (0.0, torch.inf),
    "relu_": (0.0, torch.inf),
    "relu6": (0.0, 6.0),
    "hardtanh 0 6": (0.0, 6.0),
}
"""Activation by torch's name -> beyond what it does not tell its input apart."""


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to 256 values from `lowest` in steps of `scale`, zero among them.

    The range follows from what is seen: `observing` notes the extremes of every call, `settle` moves the range towards
    them.

    Attributes:
        scale, lowest: scalars, learned with the weights and kept with them
        limits: lowest and highest value that the range may reach
        rounding: False while the ranges of float activations are measured
        observing: whether training moves the range
        fixed: (scale, code of zero) as plain numbers, for an exported graph
    """

    scale: Tensor
    lowest: Tensor
    extremes: Tensor
    limits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("lowest", torch.tensor(0.0))
        self.register_buffer("extremes", torch.tensor([torch.inf, -torch.inf]), persistent=False)
        self.register_buffer("limits", torch.tensor([-torch.inf, torch.inf]), persistent=False)
        self.rounding, self.observing = True, True
        self.fixed: tuple[float, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:  # of shapes alone, by which operations are counted
            return x
        if self.fixed is None and self.observing and (self.training or not self.rounding):
            low, high = torch.aminmax(x.detach())
            self.extremes.copy_(
                torch.stack((torch.minimum(self.extremes[0], low), torch.maximum(self.extremes[1], high)))
            )
        if not self.rounding:
            return x
        if self.fixed is not None:
            return torch.fake_quantize_per_tensor_affine(x, self.fixed[0], self.fixed[1], 0, CODES)
        scale, zero = self.codes()
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, CODES)

    def codes(self) -> tuple[Tensor, Tensor]:
        """The scale and the code of zero, a whole number from 0 to 255."""
        scale = self.scale_now()
        return scale, (-self.lowest / scale).round().clamp(0, CODES).to(torch.int32)

    def scale_now(self) -> Tensor:
        """The scale, never 0."""
        return self.scale.clamp(min=LEAST_SCALE)

    def fix(self) -> None:
        """Compute with plain numbers from here on."""
        scale, zero = self.codes()
        self.fixed = (float(scale), int(zero))


@torch.no_grad()
def settle(quantizers: list[ActivationQuantizer], momentum: float, mean: Callable[[Tensor], Tensor]) -> None:
    """Move every range by `momentum` towards the extremes seen since the last time, of which `mean` is taken over processes."""
    extremes, lowest = torch.stack([q.extremes for q in quantizers]), torch.stack([q.lowest for q in quantizers])
    scale = torch.stack([q.scale for q in quantizers])
    before = torch.stack((lowest, lowest + CODES * scale), dim=1)
    extremes = mean(torch.where(extremes.isfinite(), extremes, before))  # a layer that did not run stays as it was
    limits = torch.stack([q.limits for q in quantizers])
    low = torch.maximum(extremes[:, 0].clamp(max=0), limits[:, 0])
    scale = (torch.minimum(extremes[:, 1].clamp(min=0), limits[:, 1]) - low) / CODES
    torch._foreach_lerp_([q.scale for q in quantizers], list(scale.unbind()), momentum)
    torch._foreach_lerp_([q.lowest for q in quantizers], list(low.unbind()), momentum)
    for quantizer in quantizers:
        quantizer.extremes[0], quantizer.extremes[1] = torch.inf, -torch.inf


class FoldedNorm(nn.Module):
    """A batch norm whose work is done in the weights of the convolution before it; `rest` is what it does besides.

    Its tensors keep their names. The statistics do not change any more.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name, parameter in norm.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        rest = rest_of(norm)
        assert rest is not None
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(x)
        return y

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and bias of a convolution with this norm in them."""
        mean, deviation = self.get_buffer("running_mean"), (self.get_buffer("running_var") + self.eps).sqrt()
        gain, shift = self._parameters.get("weight"), self._parameters.get("bias")
        factor = 1 / deviation if gain is None else gain / deviation
        moved = -mean * factor if bias is None else (bias - mean) * factor
        return weight * factor[:, None, None, None], moved if shift is None else moved + shift


class QuantizedConv(nn.Conv2d):
    """A convolution with int8 weights, a scale an output channel, between two activations of 8 bits each.

    It has the weights of `conv` under their names. Computed in float32 whatever the autocast dtype, in which codes would
    not be exact.
    """

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm | None, most: int) -> None:
        assert conv.padding_mode == "zeros"
        super().__init__(conv.in_channels, conv.out_channels, 1, bias=False, device="meta")
        for name in ("kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self.weight, self.bias = conv.weight, conv.bias
        self.around: list[int] | None = getattr(conv, "around", None)
        self.norm: tuple[FoldedNorm | None] = (norm,)  # in a tuple, since it is a module of another place
        self.most = most
        self.input, self.output = ActivationQuantizer(), ActivationQuantizer()
        self.weight_scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            x = full_precision(x)
            if self.around is not None:
                x = F.pad(x, self.around)
            weight, bias = self.rounded()
            y: Tensor = self.output(self._conv_forward(self.input(x), weight, bias))
            return y

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weights and bias with the batch norm in them."""
        (norm,) = self.norm
        return (self.weight, self.bias) if norm is None else norm.folded(self.weight, self.bias)

    def rounded(self) -> tuple[Tensor, Tensor | None]:
        """Weights and bias on their grids; the bias has the steps of the sums of products, which are whole numbers."""
        weight, bias = self.folded()
        if not self.input.rounding or weight.is_meta:
            return weight, bias
        scale = self.weight_scale if self.weight_scale is not None else self.scale_of(weight, bias)
        zeros = torch.zeros_like(scale)  # of integers torch reads the extremes, which waits for the device
        if bias is not None:
            step = scale * self.input.scale_now()
            bias = bias + ((bias / step).round() * step - bias).detach()
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, 0, *WEIGHT_CODES), bias

    def scale_of(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(cout,) one step of each output channel: its largest weight is the code `most`.

        Of a channel with hardly any weights it is larger: runtimes hold the bias in 32 bits, in steps of this times the
        input's.
        """
        scale = (weight.detach().abs().flatten(1).amax(1) / self.most).clamp(min=LEAST_SCALE)
        if bias is None:
            return scale
        return torch.maximum(scale, bias.detach().abs() / (self.input.scale_now() * MOST_BIAS))

    @torch.no_grad()
    def fix(self) -> None:
        """Fold the norm for good and make every scale a plain number, as an exported graph wants it."""
        weight, bias = self.folded()
        self.norm = (None,)
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.weight_scale = self.scale_of(weight, bias)
        self.input.fix()
        self.output.fix()


class QuantizedDeformable(QuantizedConv):
    """A deformable convolution: its samples are the input that is rounded. The offsets come from outside or from its own layer."""

    def __init__(self, conv: DeformableConv, norm: FoldedNorm | None, most: int) -> None:
        super().__init__(conv, norm, most)
        if isinstance(conv, SelfOffsetConv):
            self.conv_offset = conv.conv_offset

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        with without_autocast(x):
            offset = self.conv_offset(x) if offset is None else offset
            cells = samples(full_precision(x), full_precision(offset), self.stride[0], int(self.padding[0]))
            weight, bias = self.rounded()
            y: Tensor = self.output(F.conv2d(self.input(cells), of_samples(weight), bias, groups=self.groups))
            return y

    def fix(self) -> None:
        super().fix()
        self.weight = nn.Parameter(of_samples(self.weight), requires_grad=False)


def fake_quantize(detector: Detector[Any, Any], weight_bits: int) -> None:
    """Replace every convolution that runs in a forward pass by its quantized form, in place; the weights keep their names.

    Ranges are those of a state dict that is loaded, or of images (`observe`). UserError: it is quantized already, or it
    has no convolution.
    """
    if quantized_layers(detector):
        raise UserError("this model is quantized already")
    pairs = norms_after(detector)
    if not pairs:
        raise UserError(f"a {detector.family} has no convolution to quantize")
    most = 2 ** (weight_bits - 1) - 1
    norms: dict[nn.Module, FoldedNorm] = {norm: FoldedNorm(norm) for norm in pairs.values() if norm is not None}
    convolutions: dict[nn.Module, QuantizedConv] = {}
    for conv, norm in pairs.items():
        folded = None if norm is None else norms[norm]
        if isinstance(conv, DeformableConv):
            convolutions[conv] = QuantizedDeformable(conv, folded, most)
        else:
            convolutions[conv] = QuantizedConv(conv, folded, most)
    replace_modules(detector, {**norms, **convolutions})
    layers = quantized_layers(detector)
    readers = readers_of(detector, {layer.output: name for name, layer in layers.items()})
    for name, layer in layers.items():
        limits = [_LIMITS[reader] for reader in readers[name] if reader in _LIMITS]
        if limits and len(limits) == len(readers[name]):
            layer.output.limits = torch.tensor([min(low for low, _ in limits), max(high for _, high in limits)])


def quantized_layers(module: nn.Module) -> dict[str, QuantizedConv]:
    """The quantized convolutions by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantizedConv)}


def activation_quantizers(module: nn.Module) -> list[ActivationQuantizer]:
    return [m for m in module.modules() if isinstance(m, ActivationQuantizer)]


def observe(detector: Detector[Any, Any], batches: Iterator[Tensor]) -> None:
    """Set the ranges of activations: the means of the extremes of batches (B, 3, H, W), in float32 without rounding."""
    quantizers = activation_quantizers(detector)
    for quantizer in quantizers:
        quantizer.rounding = False
    with torch.no_grad():
        for number, batch in enumerate(batches):
            detector(batch)
            settle(quantizers, 1 / (number + 1), lambda x: x)
    for quantizer in quantizers:
        quantizer.rounding = True
