"""Adapters: from a student's map to the channels and the size of the teacher's."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.types import Tap


@without_autocast
def match_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, C, h, w) to `size`; the very same tensor when it has that size already."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(full_precision(x), size=size, mode="bilinear", align_corners=False)


class Adapters(nn.Module):
    """A trainable 1x1 convolution for each tap and level whose channels differ; nothing where they agree."""

    def __init__(self, pairing: Pairing, taps: Iterable[Tap]) -> None:
        super().__init__()
        self.convs = nn.ModuleDict()
        for tap in taps:
            for level in pairing.levels_of(tap):
                student, teacher = pairing.channels(tap, level)
                if student != teacher:
                    self.convs[self.key(tap, level)] = nn.Conv2d(student, teacher, 1)

    @staticmethod
    def key(tap: Tap, level: LevelPair) -> str:
        return f"{tap}_s{level.stride}"

    @without_autocast
    def forward(self, student: Tensor, teacher: Tensor, tap: Tap, level: LevelPair) -> Tensor:
        """Student map (B, Cs, h, w) -> (B, Ct, H, W) beside the teacher's (B, Ct, H, W), float32 (float64 stays)."""
        key = self.key(tap, level)
        x = full_precision(student)
        if key in self.convs:
            x = self.convs[key](x)
        return match_size(x, (teacher.shape[2], teacher.shape[3]))
