"""Spatial and channel attention of detectors, and how far two are apart (FGD Figures 1 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from yoloxkd.explain.scene import Model
from yoloxkd.kd.defaults import kd_defaults
from yoloxkd.kd.functional.attention import channel_attention, spatial_attention
from yoloxkd.kd.functional.precision import full_precision
from yoloxkd.types import DetectorOutput


def published_tau(family: str) -> float:
    """The temperature that FGD has for students of a detector family."""
    return float(kd_defaults("fgd", family)["tau"])


@dataclass(frozen=True, slots=True)
class LevelAttention:
    """Attention on one level of the neck.

    Attributes:
        stride: px
        spatial: (h, w) float32, mean 1 over the cells
        channels: (C,) float32, mean 1 over the channels
    """

    stride: int
    spatial: np.ndarray
    channels: np.ndarray


@dataclass(frozen=True, slots=True)
class AttentionDistance:
    """How far a student's attention is from a teacher's on one level.

    Attributes:
        stride: px
        spatial_l1, channel_l1: sum of the absolute differences over cells and over channels, as in FGD eq. (10) before its
            weight; None where the two have other numbers of channels, which have no partners without a trained adapter
        spatial_rank, channel_rank: Spearman's rank correlation, -1 to 1; NaN where one of them is constant
    """

    stride: int
    spatial_l1: float
    spatial_rank: float
    channel_l1: float | None
    channel_rank: float | None


@torch.no_grad()
def attention_maps(model: Model, out: DetectorOutput, tau: float | None = None) -> list[LevelAttention]:
    """Attention of every level of the neck, for the first image of an output. FGD eq. (5) to (8).

    Args:
        out: what `see(model, scene)` gave
        tau: temperature of both softmaxes; None: FGD's for the model's family

    Example:
        >>> levels = attention_maps(model, see(model, scene))
        >>> levels[0].spatial.mean()
        1.0
    """
    temperature = published_tau(model.detector.family) if tau is None else tau
    levels = []
    for stride, level in zip(model.detector.spec.strides, out.features, strict=False):
        strong = full_precision(level[:1]).abs()
        cells = spatial_attention(strong.mean(1).flatten(1), temperature).unflatten(1, strong.shape[2:])
        channels = channel_attention(strong.mean((2, 3)), temperature)
        levels.append(LevelAttention(stride, cells[0].float().cpu().numpy(), channels[0].float().cpu().numpy()))
    return levels


def attention_distances(
    student: Sequence[LevelAttention], teacher: Sequence[LevelAttention]
) -> list[AttentionDistance]:
    """Distances on the strides that both have, finest first."""
    levels = {level.stride: level for level in teacher}
    return [_distance(level, levels[level.stride]) for level in student if level.stride in levels]


def _distance(student: LevelAttention, teacher: LevelAttention) -> AttentionDistance:
    student_cells, teacher_cells = student.spatial.ravel(), teacher.spatial.ravel()
    alike = student.channels.shape == teacher.channels.shape
    return AttentionDistance(
        student.stride,
        float(np.abs(student_cells - teacher_cells).sum()),
        _rank_correlation(student_cells, teacher_cells),
        float(np.abs(student.channels - teacher.channels).sum()) if alike else None,
        _rank_correlation(student.channels, teacher.channels) if alike else None,
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, NaN where one of the two is constant."""
    from scipy.stats import rankdata

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])
