"""Backbones of timm that give feature maps, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.errors import UserError, nearest
from yoloxkd.nn.backbones.pretrained import BackboneStart, start_backbone
from yoloxkd.nn.deform import make_deformable
from yoloxkd.nn.detector import InputConvention

STRIDES = (8, 16, 32)
Style = Literal["pytorch", "caffe"]
NORMS = (nn.modules.batchnorm._NormBase,)


class TimmBackbone(nn.Module):
    """A timm `features_only` network: (B, 3, H, W) -> its maps of the given strides, finest first.

    name           a timm model, with or without the tag of its weights ("resnet50", "resnet50.tv_in1k")
    frozen_stages  0: everything trains; n: all up to the map of stride 2^(n + 1) keeps its weights, so 1 is the stem
                   and the stage of stride 4
    norm_eval      batch norms keep their statistics in training mode
    norm_frozen    their weights and biases do not train either
    norm_eps       added to their variances; None: that of the network
    style          "caffe": the blocks of a ResNet that halve the map do so in their first 1x1 convolution
    last_conv      the map of stride 32 goes through the 1x1 convolution that a MobileNetV2 or EfficientNet has before its
                   classifier
    deformable_stages   of a ResNet, from the coarsest: their 3x3 convolutions are deformable
    channels       of the maps
    The weights are random until `start`. UserError: no such model, or one without maps of these strides.
    """

    def __init__(
        self,
        name: str,
        *,
        strides: Sequence[int] = STRIDES,
        frozen_stages: int = 0,
        norm_eval: bool = False,
        norm_frozen: bool = False,
        norm_eps: float | None = None,
        style: Style = "pytorch",
        last_conv: bool = False,
        deformable_stages: int = 0,
    ) -> None:
        super().__init__()
        self.name = name
        self.body = create(name)
        info = self.body.feature_info
        reductions = list(info.reduction())
        if not set(strides) <= set(reductions):
            raise UserError(
                f"backbone '{name}' has maps of strides {reductions}, and the pyramid needs {list(strides)}; choose "
                "another"
            )
        self._indices = [max(i for i, s in enumerate(reductions) if s == stride) for stride in strides]
        channels = [int(info.channels()[i]) for i in self._indices]
        self._ends = dict(zip(reductions, map(str, info.module_name()), strict=True))
        _fix_padding(self.body)
        if style == "caffe":
            _stride_first(self.body, name)
        if deformable_stages:
            make_deformable(self.body, deformable_stages, name)
        self.last_conv = last_conv
        if last_conv:
            channels[-1] = _add_last_conv(self.body, name)
        self.channels = tuple(channels)
        for norm in (m for m in self.body.modules() if isinstance(m, NORMS)):
            norm.eps = norm.eps if norm_eps is None else norm_eps
        self._frozen: list[nn.Module] = []
        self.freeze(frozen_stages, norm_eval, norm_frozen)

    def freeze(self, stages: int, norm_eval: bool, norm_frozen: bool = False) -> None:
        """Choose anew what does not train; see `frozen_stages`, `norm_eval` and `norm_frozen`."""
        if stages and 2 ** (stages + 1) not in self._ends:
            numbers = [n for n in range(1, 5) if 2 ** (n + 1) in self._ends]
            raise UserError(
                f"student.frozen_stages {stages}: backbone '{self.name}' has no such stage; give 0 or one of {numbers}"
            )
        self.norm_eval = norm_eval
        self._freeze_arguments = (stages, norm_eval, norm_frozen)
        self._frozen = _modules_up_to(self.body, self._ends[2 ** (stages + 1)]) if stages else []
        for parameter in self.body.parameters():
            parameter.requires_grad_(True)
        norms = [m for m in self.body.modules() if isinstance(m, NORMS)] if norm_frozen else []
        for module in [*self._frozen, *norms]:
            module.requires_grad_(False)
        self.train(self.training)

    def freeze_again(self) -> None:
        """The same choice as before, for modules that have been replaced since."""
        self.freeze(*self._freeze_arguments)

    def start(self, source: str) -> BackboneStart:
        """Load published weights; `source` is "imagenet", "none" or a file (see `pretrained.start_backbone`)."""
        return start_backbone(self.body, self.name, source)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Training mode, except for what is frozen."""
        super().train(mode)
        if mode:
            norms = [m for m in self.body.modules() if isinstance(m, NORMS)] if self.norm_eval else []
            for module in [*self._frozen, *norms]:
                module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        all_maps = self.body(x)
        maps = [all_maps[i] for i in self._indices]
        if self.last_conv:
            maps[-1] = self.body.bn2(self.body.conv_head(maps[-1]))
        return maps


def create(name: str) -> Any:
    """The timm network with random weights; UserError when there is none of that name or it gives no maps."""
    import timm

    try:
        body = timm.create_model(name, features_only=True, pretrained=False)
    except RuntimeError as error:
        if "nknown model" not in str(error):
            raise UserError(f"backbone '{name}' cannot give feature maps: {error}") from error
        suggestion = nearest(name, timm.list_models())
        raise UserError(f"unknown backbone '{name}' (it should be a model of timm); {suggestion}") from error
    except (AttributeError, TypeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"backbone '{name}' of timm cannot give feature maps; choose another") from error
    layout = getattr(body, "output_fmt", "NCHW")
    if getattr(layout, "value", layout) != "NCHW":
        raise UserError(f"backbone '{name}' works on inputs of one size only; choose a convolutional one")
    return body


def input_convention(name: str) -> InputConvention:
    """RGB with the mean and standard deviation that timm's weights of this name were trained with."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    mean = _triple(cfg.mean if cfg else (0.485, 0.456, 0.406))
    std = _triple(cfg.std if cfg else (0.229, 0.224, 0.225))
    return InputConvention(mean=mean, std=std, pad_value=gray(mean))


def gray(mean: Sequence[float]) -> tuple[int, int, int]:
    """The padding that becomes (nearly) zero once the mean is subtracted."""
    r, g, b = (round(v) for v in mean)
    return r, g, b


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    a, b, c = (v * 255 for v in values)
    return a, b, c


class FixedSame(nn.Conv2d):
    """TensorFlow's SAME padding for sizes that the stride divides, as they all are here: the same at every size.

    timm works it out anew from each input's size, which leaves a graph of free size full of arithmetic. The weights are
    those of `conv`.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        sizes = (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride[0], conv.stride[1])
        super().__init__(
            conv.in_channels, conv.out_channels, *sizes,
            dilation=(conv.dilation[0], conv.dilation[1]), groups=conv.groups, bias=False, device="meta",
        )  # fmt: skip
        self.weight, self.bias = conv.weight, conv.bias
        around: list[int] = []
        for axis in (1, 0):
            total = max((self.kernel_size[axis] - 1) * self.dilation[axis] + 1 - self.stride[axis], 0)
            around += [total // 2, total - total // 2]
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self.around)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _fix_padding(body: nn.Module) -> None:
    """Replace every convolution that works out its padding from the size of its input."""
    from timm.layers import Conv2dSame

    for parent in list(body.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame):
                setattr(parent, name, FixedSame(child))


def _add_last_conv(body: nn.Module, name: str) -> int:
    """Give a timm network without classifier its last 1x1 convolution and norm back, under their own names; channels."""
    import timm

    with torch.random.fork_rng(devices=[]):
        whole = timm.create_model(name, pretrained=False)
    conv, norm = getattr(whole, "conv_head", None), getattr(whole, "bn2", None)
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or conv.kernel_size != (1, 1):
        raise UserError(
            f"student.last_conv is for MobileNetV2 and EfficientNet, and '{name}' has no such convolution; use false"
        )
    body.add_module("conv_head", conv)
    body.add_module("bn2", norm)
    return conv.out_channels


def _stride_first(body: nn.Module, name: str) -> None:
    """Move the stride of every bottleneck from its 3x3 convolution to the 1x1 before it."""
    moved = 0
    for module in body.modules():
        first, second = getattr(module, "conv1", None), getattr(module, "conv2", None)
        if not isinstance(first, nn.Conv2d) or not isinstance(second, nn.Conv2d):
            continue
        if first.kernel_size == (1, 1) and second.stride != (1, 1):
            first.stride, second.stride = second.stride, (1, 1)
            moved += 1
    if not moved:
        raise UserError(f"student.style caffe is for ResNets with bottlenecks, and '{name}' is none; use pytorch")


def _modules_up_to(body: nn.Module, last: str) -> list[nn.Module]:
    """The modules that come before the end of the module `last`, and lie there whole; timm registers them in order."""
    places = {last, last.replace(".", "_")}
    modules = list(body.named_modules())
    end = max(i for i, (name, _) in enumerate(modules) if any(name == p or name.startswith(p + ".") for p in places))
    after = modules[end + 1][0] if end + 1 < len(modules) else ""
    return [module for name, module in modules[: end + 1] if name and not after.startswith(name + ".")]
