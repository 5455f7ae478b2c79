"""Feature-based Knowledge Distillation (FKD, Zhang & Ma, ICLR 2021): attended maps, their means, and non-local relations."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yoloxkd.kd.adapters import match_size
from yoloxkd.kd.base import Distiller, KDConfig, Step
from yoloxkd.kd.defaults import published
from yoloxkd.kd.functional.attention import channel_attention, spatial_attention
from yoloxkd.kd.functional.divergence import root
from yoloxkd.kd.functional.fused import cell_and_channel_means, weighted_squares
from yoloxkd.kd.functional.masks import excluded_cells
from yoloxkd.kd.functional.precision import full_precision, without_autocast
from yoloxkd.kd.functional.relation import PooledNonLocal, related_difference
from yoloxkd.kd.pairing import LevelPair, Pairing
from yoloxkd.types import DetectorOutput, Loss, Losses, LossName, Tap

POOLS, COARSE_POOL = (8, 4), 2
"""Side of the non-local blocks' pooling on the two finest levels, and on the others."""
FINE_SHARE, COARSE_SHARE = 4, 2
"""Channels over the inner channels of a non-local block, likewise: 64 and 128 of 256."""


class FKDConfig(KDConfig):
    """Keys of `kd` for FKD."""

    tau: float = published("fkd", "tau", gt=0, description="temperature of both attentions")
    alpha: float = published("fkd", "alpha", ge=0, description="weight of the attended maps")
    beta: float = published("fkd", "beta", ge=0, description="weight of the channels' means")
    gamma: float = published("fkd", "gamma", ge=0, description="weight of the cells' means")
    delta: float = published("fkd", "delta", ge=0, description="weight of the non-local relations")
    channel_mask: bool = published("fkd", "channel_mask", description="the maps attend to channels as well as cells")


@torch.no_grad()
@without_autocast
def fkd_attention(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """What the squared errors weigh: the mean of both sides' attention over cells (B, N), and over channels (B, C).

    student, teacher (B, N, C), cells of maps in rows. FKD eq. (1) to (4).
    """
    student_map, teacher_map = (full_precision(x).abs() for x in (student, teacher))
    cells = (spatial_attention(student_map.mean(2), tau) + spatial_attention(teacher_map.mean(2), tau)) / 2
    return cells, (channel_attention(student_map.mean(1), tau) + channel_attention(teacher_map.mean(1), tau)) / 2


@without_autocast
def attended_norm(difference: Tensor, cells: Tensor, channels: Tensor | None = None) -> Tensor:
    """Root of the weighted sum of squares of each image: (B, N, C), weights (B, N) and (B, C) -> (B,)."""
    return root(weighted_squares(difference, cells, channels))


class FKDBlocks(nn.Module):
    """What FKD trains for one level of the neck: parts by name, those of the terms that are on and no others.

    Attributes:
        student, teacher: channels of the maps
        index: of the level, 0 the finest
    """

    def __init__(self, student: int, teacher: int, index: int, terms: Collection[str]) -> None:
        super().__init__()
        pool = POOLS[index] if index < len(POOLS) else COARSE_POOL
        share = FINE_SHARE if index < len(POOLS) else COARSE_SHARE
        self.parts = nn.ModuleDict()
        if "feat" in terms:
            self.parts["map"] = nn.Linear(student, teacher)
        if "channel" in terms:
            self.parts["channels"] = nn.Linear(student, teacher)
        if "spatial" in terms:
            self.parts["cells"] = nn.Conv2d(1, 1, 3, padding=1)
        if "nonlocal" in terms:
            self.parts["student"] = PooledNonLocal(student, max(1, student // share), pool)
            self.parts["teacher"] = PooledNonLocal(teacher, max(1, teacher // share), pool)
            self.parts["relation"] = nn.Linear(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Cells of both maps in rows (B, h w, C), and their size (h, w) -> the difference of each term."""
        parts, differences = self.parts, {}
        if "map" in parts:
            differences["feat"] = parts["map"](student) - teacher
        of_cells, of_channels = cell_and_channel_means(student)
        teacher_cells, teacher_channels = cell_and_channel_means(teacher)
        if "channels" in parts:
            differences["channel"] = parts["channels"](of_channels) - teacher_channels
        if "cells" in parts:
            # as a product with the cells around each: a convolution of one channel is slow
            kernel = parts["cells"]
            around = F.unfold(of_cells.unflatten(1, size)[:, None], 3, padding=1)
            cells = F.linear(
                around.transpose(1, 2), kernel.get_parameter("weight").flatten(1), kernel.get_parameter("bias")
            )
            differences["spatial"] = cells.squeeze(2) - teacher_cells
        if "relation" in parts:
            blocks, relation = (parts["student"], parts["teacher"]), parts["relation"]
            assert isinstance(blocks[0], PooledNonLocal)
            assert isinstance(blocks[1], PooledNonLocal)
            assert isinstance(relation, nn.Linear)
            differences["nonlocal"] = related_difference(student, teacher, (blocks[0], blocks[1]), relation, size)
        return differences


class FKD(Distiller):
    """FKD on every paired level of the neck: `feat`, `channel`, `spatial` and `nonlocal`, norms of an image that are not squared."""

    Config = FKDConfig
    name: ClassVar[str] = "fkd"

    def __init__(self, cfg: FKDConfig, pairing: Pairing) -> None:
        super().__init__(cfg, pairing)
        self.cfg = cfg
        self.needs = frozenset({Tap.NECK})
        weights = {"feat": cfg.alpha, "channel": cfg.beta, "spatial": cfg.gamma, "nonlocal": cfg.delta}
        self.weights = {term: weight for term, weight in weights.items() if weight > 0}
        self.terms = tuple(LossName(self.name, term, level.stride) for level in pairing.levels for term in self.weights)
        self.blocks = nn.ModuleDict(
            {
                f"s{level.stride}": FKDBlocks(*pairing.channels(Tap.NECK, level), i, self.weights)
                for i, level in enumerate(pairing.levels)
            }
        )

    def compare(self, step: Step[DetectorOutput]) -> Losses:
        out: Losses = {}
        for level in self.pairing.levels:
            for term, value in self._level(step, level).items():
                out[LossName(self.name, term, level.stride)] = Loss(value.mean() * self.weights[term])
        return out

    @without_autocast
    def _level(self, step: Step[DetectorOutput], level: LevelPair) -> dict[str, Tensor]:
        """The terms of a level before their weights, (B,) each."""
        student_map, teacher_map = step.maps(Tap.NECK, level)
        size, cfg = (teacher_map.shape[2], teacher_map.shape[3]), self.cfg
        teacher_map = _rows(teacher_map.detach())
        student_map = _rows(match_size(student_map, size))
        differences: dict[str, Tensor] = self.blocks[f"s{level.stride}"](student_map, teacher_map, size)
        norms = {
            term: torch.linalg.vector_norm(x.flatten(1), dim=1) for term, x in differences.items() if term != "feat"
        }
        if "feat" in differences:
            # channels that differ have no attention in common, so that of the adapted map is taken then
            alike = student_map.shape[2] == teacher_map.shape[2]
            attending = student_map if alike else differences["feat"].detach() + teacher_map
            cells, channels = fkd_attention(attending, teacher_map, cfg.tau)
            cells = cells.masked_fill(excluded_cells(step.batch, size, step.teacher.image_size).flatten(1), 0.0)
            norms["feat"] = attended_norm(differences["feat"], cells, channels if cfg.channel_mask else None)
        return norms

    def maps(self, step: Step[DetectorOutput]) -> dict[str, Tensor]:
        """The attention that both have together."""
        out = {}
        for level in self.pairing.levels:
            student_map, teacher_map = step.maps(Tap.NECK, level)
            student_map = match_size(student_map, (teacher_map.shape[2], teacher_map.shape[3]))
            strength = (_rows(x).abs().mean(2) for x in (student_map, teacher_map))
            cells = torch.stack([spatial_attention(x, self.cfg.tau) for x in strength]).mean(0)
            out[f"attention, stride {level.stride}"] = cells.unflatten(1, teacher_map.shape[2:])
        return out


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C), contiguous: a view of a map in channels_last, a copy of another."""
    return full_precision(x).flatten(2).transpose(1, 2).contiguous()
