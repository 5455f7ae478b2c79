"""Spatial and channel attention of FGD and PGD."""

from __future__ import annotations

from torch import Tensor


def spatial_attention(strength: Tensor, tau: float) -> Tensor:
    """N softmax(strength / tau): mean over channels of |F| at each of N cells (B, N) -> (B, N), sums to N. FGD eq. (7).

    PGD eq. (7) prints a sum over channels; its code takes the mean, and so do we.
    """
    return (strength / tau).softmax(1).mul(strength.shape[1])


def channel_attention(strength: Tensor, tau: float) -> Tensor:
    """C softmax(strength / tau): mean over cells of |F| in each channel (B, C) -> (B, C), sums to C. FGD eq. (8)."""
    return (strength / tau).softmax(1).mul(strength.shape[1])


def local_channel_attention(magnitude: Tensor, tau: float) -> Tensor:
    """C softmax over channels of |F| / tau at each cell: (B, C, ...) -> (B, C, ...), sums to C. PGD eq. (7)."""
    return (magnitude / tau).softmax(1).mul(magnitude.shape[1])
