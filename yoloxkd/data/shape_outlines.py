"""Outlines of the built-in shapes: closed contours inside the unit circle."""

from __future__ import annotations

import numpy as np


def _arc(start: float, end: float, steps: int, radius: float = 1.0, center: tuple[float, float] = (0, 0)) -> np.ndarray:
    """(steps, 2) points of an arc, angles in turns."""
    angle = 2 * np.pi * np.linspace(start, end, steps)
    return np.stack([np.cos(angle), np.sin(angle)], -1) * radius + center


def _regular(corners: int) -> np.ndarray:
    return _arc(0, 1, corners + 1)[:-1]


def _star(corners: int, inner: float) -> np.ndarray:
    radius = np.where(np.arange(2 * corners) % 2, inner, 1.0)
    return _regular(2 * corners) * radius[:, None]


def _cross(arm: float) -> np.ndarray:
    """A plus sign with arms of half-width `arm`."""
    reach = np.sqrt(1 - arm**2)
    quarter = np.array([[reach, -arm], [reach, arm], [arm, arm]])
    turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return np.concatenate([quarter @ turn.T for turn in turns])


def _crescent() -> np.ndarray:
    """A circle less a smaller one beside its center."""
    outer = _arc(0.14, 0.86, 32)
    tip = outer[0]
    center = np.array([0.55, 0.0])
    start = np.arctan2(tip[1], tip[0] - center[0]) / (2 * np.pi)
    inner = _arc(1 - start, start, 32, float(np.hypot(*(tip - center))), (0.55, 0.0))
    return np.concatenate([outer, inner])


def _heart() -> np.ndarray:
    """The classic curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, brought to the unit circle."""
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], -1) / 18.21


# A second contour is a hole.
OUTLINES: dict[str, list[np.ndarray]] = {
    "circle": [_regular(48)],
    "square": [_regular(4)],
    "triangle": [_regular(3)],
    "star": [_star(5, 0.42)],
    "ring": [_regular(48), _regular(48) * 0.55],
    "cross": [_cross(0.28)],
    "diamond": [_regular(4) * (1.0, 0.5)],
    "hexagon": [_regular(6)],
    "crescent": [_crescent()],
    "heart": [_heart()],
}
