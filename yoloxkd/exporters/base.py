"""Export graph of a detector: pixels in, boxes and scores out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from yoloxkd.nn.deform import DeformableConv, of_samples
from yoloxkd.nn.detector import Detector


class Exportable(nn.Module):
    """A frozen copy of a detector in evaluation mode and float32, batch norm folded, reduced to boxes and scores.

    forward: images (N, 3, H, W) float32 or uint8, RGB 0..255 -> boxes (N, A, 4) xyxy px of the input, scores (N, A, K).
    Normalization and color order are the detector's own and become part of the graph. The detector given is not
    changed.
    """

    def __init__(self, detector: Detector[Any, Any]) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).cpu().eval().requires_grad_(False)
        fold_batch_norm(self.detector)
        for module in self.detector.modules():
            if isinstance(module, DeformableConv):  # so that a graph's weights keep the name of their layer
                module.weight = nn.Parameter(of_samples(module.weight), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores, _ = self.choices(self.detector(images))
        return boxes, scores

    def choices(self, out: Any) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Boxes and scores of an output, as `forward`, and how many of the A locations each feature level has."""
        return *self.detector.candidates(out), self.detector.level_sizes(out)


def fold_batch_norm(detector: Detector[Any, Any]) -> None:
    """Put every batch norm that follows a convolution into that convolution's weights, in place, computed in float64.

    Which follows which is seen in a forward pass, not guessed from names; a convolution that feeds two different norms,
    or a norm fed by two convolutions, stays as it is. The detector is left in float32.
    """
    pairs = _followers(detector.double())
    convolutions = [conv for conv, _ in pairs]
    norms = [norm for _, norm in pairs]
    for conv, norm in pairs:
        if convolutions.count(conv) == norms.count(norm) == 1:
            fused = fuse_conv_bn_eval(conv, norm)
            conv.weight, conv.bias = fused.weight, fused.bias
            _replace(detector, norm, _rest(norm))
    detector.float().requires_grad_(False)


def _followers(detector: Detector[Any, Any]) -> set[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Pairs of a convolution and the batch norm that reads its output."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: set[tuple[nn.Conv2d, nn.BatchNorm2d]] = set()

    def after_conv(module: nn.Module, _: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output)  # the tensor is kept, so that its id is not given to another

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if _rest(module) is not None and id(inputs[0]) in made:
            pairs.add((made[id(inputs[0])][0], module))

    hooks = [m.register_forward_hook(after_conv) for m in detector.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    side = 2 * detector.size_multiple
    with torch.no_grad():
        detector(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return pairs


def _rest(norm: nn.BatchNorm2d) -> nn.Module | None:
    """What a norm does besides normalizing: timm's own kind has an activation inside. None: a kind not known here."""
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    inside = dict(norm.named_children())
    return inside["act"] if inside.keys() == {"drop", "act"} else None


def _replace(root: nn.Module, old: nn.Module, new: nn.Module | None) -> None:
    for module in root.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
