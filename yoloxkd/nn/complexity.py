"""Parameters and multiply-adds of a detector."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from yoloxkd.nn.detector import Detector

NORM_FLOPS = 4
"""Operations a normalized number: the published figures of the YOLOX sizes count two multiply-adds."""


@dataclass(frozen=True, slots=True)
class Complexity:
    """parameters: trained numbers; flops: floating-point operations of one image, two per multiply-add."""

    parameters: int
    flops: int

    def describe(self) -> str:
        """In the units of the papers: M parameters, G operations."""
        return f"{self.parameters / 1e6:.2f} M parameters, {self.flops / 1e9:.2f} GFLOPs"


def complexity(detector: Detector[Any, Any], imgsz: int | tuple[int, int]) -> Complexity:
    """Parameters and operations of one image of `imgsz` px (a square's side, or height and width).

    Counts convolutions, matrix products and normalizations, which is what published figures are made of. Runs on shapes
    alone (meta tensors): nothing is computed, and the detector's weights, buffers and mode stay as they are.
    """
    height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    tensors = chain(detector.named_parameters(), detector.named_buffers())
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    image = torch.empty(1, 3, height, width, device="meta")
    normalized = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal normalized
        normalized += output.numel()

    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    hooks = [m.register_forward_hook(count) for m in detector.modules() if isinstance(m, norms)]
    modes = {module: module.training for module in detector.modules()}
    try:
        detector.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(detector, shapes, (image,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    parameters = sum(p.numel() for p in detector.parameters())
    return Complexity(parameters, counter.get_total_flops() + NORM_FLOPS * normalized)
