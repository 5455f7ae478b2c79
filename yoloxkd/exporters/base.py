"""Export graph of a detector: pixels in, boxes and scores out."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from yoloxkd.nn.conv_followers import norms_after, replace_modules, rest_of
from yoloxkd.nn.deform import DeformableConv, of_samples
from yoloxkd.nn.detector import Detector
from yoloxkd.nn.fake_quantization import quantized_layers


class Exportable(nn.Module):
    """A frozen copy of a detector in evaluation mode and float32, batch norm folded, reduced to boxes and scores.

    One whose convolutions are fake-quantized stays so, with plain numbers as scales.

    forward: images (N, 3, H, W) float32 or uint8, RGB 0..255 -> boxes (N, A, 4) xyxy px of the input, scores (N, A, K).
    Normalization and color order are the detector's own and become part of the graph. The detector given is not
    changed.
    """

    def __init__(self, detector: Detector[Any, Any]) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).cpu().eval().requires_grad_(False)
        if layers := quantized_layers(self.detector):
            for layer in layers.values():
                layer.fix()
        else:
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
    pairs = {conv: norm for conv, norm in norms_after(detector.double()).items() if norm is not None}
    for conv, norm in pairs.items():
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
    rests: dict[nn.Module, nn.Module | None] = {norm: rest_of(norm) for norm in pairs.values()}
    replace_modules(detector, rests)
    detector.float().requires_grad_(False)
