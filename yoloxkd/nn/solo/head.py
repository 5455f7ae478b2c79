"""SOLO's head (Wang et al. 2020): a class for every cell of a grid, and a mask for every cell from maps with coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.nn.dense.fpn_detector import TowerBlock
from yoloxkd.ops.losses import full_precision

PRIOR = 0.01
"""Probability of a class, and of a mask's pixel, at the start."""


class SOLOHead(nn.Module):
    """Two towers that all levels share, and a predictor of masks for each level; attributes as mmdetection's keys.

    channels of the FPN; hidden: of the towers; grids: cells of a side of each level; groups: of the towers' group norms
    """

    def __init__(
        self, channels: int, classes: int, grids: Sequence[int], *, hidden: int = 256, convs: int = 7, groups: int = 32
    ) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.mask_convs = _tower(channels + 2, hidden, convs, groups)
        self.cls_convs = _tower(channels, hidden, convs, groups)
        self.conv_mask_list = nn.ModuleList(nn.Conv2d(hidden, cells * cells, 1) for cells in grids)
        self.conv_cls = nn.Conv2d(hidden, classes, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
        for predictor in (*self.conv_mask_list, self.conv_cls):
            nn.init.constant_(predictor.get_parameter("bias"), -math.log((1 - PRIOR) / PRIOR))

    def forward(self, maps: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Maps of strides 4 to 64 -> what masks are made of, L x (B, C, 2 h, 2 w), and class logits (B, cells, K).

        The finest map is resized to the second's size, the coarsest to that of the one before it.
        """
        maps = [_resized(maps[0], maps[1].shape[-2:]), *maps[1:-1], _resized(maps[-1], maps[-2].shape[-2:])]
        features, logits = [], []
        for x, cells in zip(maps, self.grids, strict=True):
            y = torch.cat((x, _coordinates(x)), 1)
            for block in self.mask_convs:
                y = block(y)
            features.append(_resized(y, (2 * y.shape[2], 2 * y.shape[3])))
            z = _resized(x, (cells, cells))
            for block in self.cls_convs:
                z = block(z)
            logits.append(self.conv_cls(z).flatten(2).mT)
        return tuple(features), torch.cat(logits, 1)

    def masks(self, level: int, features: Tensor, cells: Tensor) -> Tensor:
        """Mask logits of cells (B, n) int64 of a level: (B, n, h, w), from its features (B, C, h, w)."""
        predictor = self.conv_mask_list[level]
        weight, bias = predictor.get_parameter("weight").flatten(1), predictor.get_parameter("bias")
        y = full_precision(weight)[cells] @ full_precision(features).flatten(2)
        logits: Tensor = (y + full_precision(bias)[cells].unsqueeze(-1)).unflatten(-1, features.shape[-2:])
        return logits


def _tower(cin: int, hidden: int, convs: int, groups: int) -> nn.ModuleList:
    blocks = [TowerBlock(hidden, groups, bias=False) for _ in range(convs)]
    blocks[0].conv = nn.Conv2d(cin, hidden, 3, padding=1, bias=False)
    return nn.ModuleList(blocks)


def _coordinates(x: Tensor) -> Tensor:
    """(B, 2, h, w) x and y of every cell, -1 in the first and 1 in the last column or row."""
    rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:])
    y, x_ = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x_, y)).expand(len(x), -1, -1, -1)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=tuple(size), mode="bilinear")
