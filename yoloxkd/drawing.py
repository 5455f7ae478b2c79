"""Draw boxes on images: readable at any size, one color a class."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_GOLDEN = 0.618033988749895


def class_color(label: int) -> tuple[int, int, int]:
    """RGB of a class: hues a golden section apart, so that neighbors in the list differ most."""
    hue = (0.02 + label * _GOLDEN) % 1.0
    value = (1.0, 0.75, 0.9)[label // 12 % 3]
    r, g, b = colorsys.hsv_to_rgb(hue, (0.9, 0.9, 0.55)[label // 6 % 3], value)
    return round(255 * r), round(255 * g), round(255 * b)


def draw_masks(image: np.ndarray, masks: np.ndarray, labels: np.ndarray, opacity: float = 0.45) -> np.ndarray:
    """image (H, W, 3) uint8 RGB, masks (n, H, W) bool, labels (n,) -> a copy tinted where the masks are, the first on top."""
    canvas = image.copy()
    for mask, label in reversed(list(zip(masks, labels, strict=True))):
        color = np.array(class_color(int(label)), np.float32)
        canvas[mask] = ((1 - opacity) * canvas[mask] + opacity * color).round().astype(np.uint8)
    return canvas


def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """image (H, W, 3) uint8 RGB, boxes (n, 4) xyxy px, labels (n,) -> a copy with boxes and their captions.

    Line width and letters grow with the image. Rows are drawn last to first, all boxes before all captions.
    """
    canvas = np.ascontiguousarray(image).copy()
    height, width = canvas.shape[:2]
    line = max(1, round(min(height, width) / 260))
    scale = max(0.36, min(height, width) / 1150)
    rows = [_inside(box, width, height) for box in boxes]
    colors = [class_color(int(k)) for k in labels]
    for (x1, y1, x2, y2), color in reversed(list(zip(rows, colors, strict=True))):
        cv2.rectangle(canvas, (x1, y1), (x2, y2), _edge(color), line + 2)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line)
    for row, color, caption in reversed(list(zip(rows, colors, captions, strict=True))):
        if caption:
            _caption(canvas, row, caption, color, scale)
    return canvas


def shortened(name: str, most: int = 40) -> str:
    """A name of at most `most` letters: of a longer one the beginning and the end, which tell it from others."""
    if len(name) <= most:
        return name
    tail = (most - 3) // 3
    return name[: most - 3 - tail] + "..." + name[-tail:]


def _shorten_to_width(text: str, width: int, scale: float, thick: int) -> str:
    """The text, or so much of its beginning and its end (where the score is) as goes into `width` px."""
    most = len(text)
    while most > 8 and cv2.getTextSize(shortened(text, most), _FONT, scale, thick)[0][0] > width:
        most -= 1
    return shortened(text, most)


def _inside(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (float(v) for v in box)
    return (
        round(min(max(x1, 0), width - 1)),
        round(min(max(y1, 0), height - 1)),
        round(min(max(x2, 0), width - 1)),
        round(min(max(y2, 0), height - 1)),
    )


def _edge(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """A darker edge, so that a line shows on a background of its own color."""
    return color[0] // 3, color[1] // 3, color[2] // 3


def _caption(
    canvas: np.ndarray, row: tuple[int, int, int, int], text: str, color: tuple[int, int, int], scale: float
) -> None:
    """A filled tag on the box's upper edge, or inside it where the image ends above."""
    thick = max(1, round(scale * 1.6))
    pad = max(2, round(4 * scale))
    text = _shorten_to_width(text.replace("\n", " "), canvas.shape[1] - 2 * pad, scale, thick)
    (w, h), below = cv2.getTextSize(text, _FONT, scale, thick)
    tag_w, tag_h = w + 2 * pad, h + below + pad
    x = max(0, min(row[0], canvas.shape[1] - tag_w))
    y = row[1] - tag_h if row[1] >= tag_h else row[1]
    y = max(0, min(y, canvas.shape[0] - tag_h))
    cv2.rectangle(canvas, (x, y), (x + tag_w, y + tag_h), color, -1)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 120
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(canvas, text, (x + pad, y + h + pad // 2 + 1), _FONT, scale, ink, thick, cv2.LINE_AA)
